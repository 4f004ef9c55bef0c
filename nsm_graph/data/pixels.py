r"""Images read as sequences, one pixel a token."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch_geometric.data import Data


class PixelSequences(Sequence[Data]):
    r"""Images as sequences of pixels in raster order, scaled to [0, 1].

    The pixels stay bytes until an example is asked for: MNIST takes 47 MB instead of 188.

    Args:
        pixels: Grey values ``[num_images, num_pixels]``, uint8.
        labels: Class of each image, ``[num_images]``.
        scale: The largest grey value.  (default: :obj:`255`)
        order: The order in which pixels are read; :obj:`None` for raster order.
            (default: :obj:`None`)

    Shapes:
        - **output:** :obj:`x` float :math:`(L, 1)`, :obj:`y` long :math:`(1)`
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, scale: int = 255, order: Tensor | None = None
    ) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images, but {len(labels)} labels; they must agree")
        self.pixels = pixels if order is None else pixels[:, order]
        self.labels = labels.long()
        self.scale = scale

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Data: ...
    @overload
    def __getitem__(self, index: slice) -> "PixelSequences": ...
    def __getitem__(self, index: int | slice) -> "Data | PixelSequences":
        if isinstance(index, slice):
            return PixelSequences(self.pixels[index], self.labels[index], scale=self.scale)
        # IndexError past the end comes from the tensor, and ends a `for` loop.
        x = self.pixels[index].to(torch.float32).div_(self.scale).unsqueeze(-1)
        return Data(x=x, y=self.labels[index].view(1))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)}, length={self.pixels.size(1)})"
