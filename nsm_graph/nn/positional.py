"""Positional encodings for sequences and for graphs (N1).

Sequence encodings take two counts per token: ``place``, its index inside its segment, and
``index``, its index in the whole stream. States have no position, so inside a segment "relative"
means relative to the segment's start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_choice

SEQUENCE_POSITIONS = ("learned", "sinusoidal", "rotary", "relative", None)


class LearnedPosition(nn.Module):
    r"""Adds a learned vector for each place inside a segment: :math:`x_i + p_{\mathrm{place}(i)}`.

    Args:
        channels: Size of each token.
        max_length: Longest segment.

    Shapes:
        - **input:** tokens :math:`(T, C_t)`, place :math:`(T,)`
        - **output:** tokens :math:`(T, C_t)`

    Example:
        >>> LearnedPosition(8, max_length=16)(torch.zeros(3, 8), torch.arange(3)).shape
        torch.Size([3, 8])
    """

    def __init__(self, channels: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table = nn.Parameter(torch.empty(max_length, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.5)

    def forward(self, x: Tensor, place: Tensor, full_length: int | None = None) -> Tensor:
        """Adds positions.

        Args:
            x: The tokens.
            place: Index of each inside its segment.
            full_length: Says that all segments have this length, and that tokens stand segment by
                segment: nothing is looked up then. (default: :obj:`None`)
        """
        if full_length is not None and full_length <= self.max_length:
            segments = x.reshape(x.size(0) // full_length, full_length, x.size(1))
            return (segments + self.table[:full_length]).flatten(0, 1)
        return x + _look_up(self.table, place)


class SinusoidalPosition(nn.Module):
    r"""Adds sines and cosines of the index in the stream; needs no parameters and has no end.

    .. math::
        p_{i,2c} = \sin(i \, \omega_c), \quad p_{i,2c+1} = \cos(i \, \omega_c), \quad
        \omega_c = 10000^{-2c/C_t}

    Args:
        channels: Size of each token.

    Shapes:
        - **input:** tokens :math:`(T, C_t)`, index :math:`(T,)`
        - **output:** tokens :math:`(T, C_t)`

    Example:
        >>> SinusoidalPosition(4)(torch.zeros(1, 4), torch.tensor([0]))
        tensor([[0., 1., 0., 1.]])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        # Angles in float64: at a million tokens float32 is off by a twentieth of a turn.
        num_waves = (self.channels + 1) // 2
        exponent = torch.arange(num_waves, device=x.device, dtype=torch.float64)
        frequency = torch.exp(exponent * (-2.0 * math.log(10_000.0) / self.channels))
        angle = index.to(torch.float64).unsqueeze(1) * frequency
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return x + waves[:, : self.channels].to(x.dtype)


class RotaryPosition(nn.Module):
    r"""Turns each pair of key channels by an angle that grows with the place in the segment.

    .. math::
        (k_{2c}, k_{2c+1}) \leftarrow R(\mathrm{place} \cdot \omega_c) \, (k_{2c}, k_{2c+1})

    Queries come from states, which stand at place 0, so scores depend on the place of the key.

    Args:
        head_channels: Channels of one head; must be even.

    Shapes:
        - **input:** keys :math:`(T, H, D)`, place :math:`(T,)`
        - **output:** keys :math:`(T, H, D)`

    Example:
        >>> key = torch.ones(2, 1, 4)
        >>> torch.equal(RotaryPosition(4)(key, torch.tensor([0, 1]))[0], key[0])
        True
    """

    def __init__(self, head_channels: int) -> None:
        super().__init__()
        if head_channels % 2 != 0:
            raise ValueError(
                f"rotary positions turn pairs of channels, but a head has {head_channels}; choose "
                f"heads so that state_channels / heads is even"
            )
        self.head_channels = head_channels

    def forward(self, key: Tensor, place: Tensor) -> Tensor:
        # Angles in float64, as for sines: a buffer would be rounded with the module's dtype.
        exponent = torch.arange(0, self.head_channels, 2, device=key.device, dtype=torch.float64)
        frequency = torch.exp(exponent * (-math.log(10_000.0) / self.head_channels))
        angle = (place.to(torch.float64).unsqueeze(1) * frequency).unsqueeze(1)
        even, odd = key[..., 0::2], key[..., 1::2]
        cos, sin = angle.cos().to(key.dtype), angle.sin().to(key.dtype)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2)


class RelativePosition(nn.Module):
    r"""A learned attention bias per head and place: :math:`b_{e,h} = p_{\mathrm{place}(i),h}`.

    Args:
        heads: Number of heads.
        max_length: Longest segment.

    Shapes:
        - **input:** place :math:`(T,)`
        - **output:** bias :math:`(T, H)`

    Example:
        >>> RelativePosition(4, max_length=16)(torch.arange(3)).shape
        torch.Size([3, 4])
    """

    def __init__(self, heads: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.table = nn.Parameter(torch.empty(max_length, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.5)

    def forward(self, place: Tensor) -> Tensor:
        return _look_up(self.table, place)


class GraphPosition(nn.Module):
    r"""Adds a projection of a graph's structural encoding to its nodes: :math:`x_i + W \, pe_i`.

    The encodings are PyG's own transforms: :class:`torch_geometric.transforms.AddRandomWalkPE` and
    :class:`torch_geometric.transforms.AddLaplacianEigenvectorPE`, stored as ``data.pe``.

    Args:
        pe_channels: Size of the encoding.
        channels: Size of each token.
        kind: ``"random_walk"`` or ``"laplacian"``; the signs of eigenvectors are arbitrary, so
            those of ``"laplacian"`` are flipped at random in training.
            (default: :obj:`"random_walk"`)

    Shapes:
        - **input:** tokens :math:`(T, C_t)`, pe :math:`(T, C_{pe})`
        - **output:** tokens :math:`(T, C_t)`

    Example:
        >>> GraphPosition(3, 8)(torch.zeros(5, 8), torch.rand(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, pe_channels: int, channels: int, kind: str = "random_walk") -> None:
        super().__init__()
        check_choice("kind", kind, ("random_walk", "laplacian"))
        self.pe_channels = pe_channels
        self.kind = kind
        self.lin = Linear(pe_channels, channels)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()

    def forward(self, x: Tensor, pe: Tensor) -> Tensor:
        if pe.shape != (x.size(0), self.pe_channels):
            raise ValueError(
                f"pe must have shape ({x.size(0)}, {self.pe_channels}), but has {tuple(pe.shape)}; "
                f"use the transform with walk_length or k = {self.pe_channels}"
            )
        if self.kind == "laplacian" and self.training:
            # One sign for each eigenvector and batch: a sign of its own for every graph would need
            # the batch vector here and gains nothing over many batches.
            pe = pe * (torch.randint(0, 2, (1, pe.size(1)), device=pe.device) * 2 - 1)
        return x + self.lin(pe.to(x.dtype))


def _look_up(table: Tensor, place: Tensor) -> Tensor:
    try:
        return table[place]
    except IndexError as error:
        raise ValueError(
            f"place names place {int(place.max())}, but the table has {table.size(0)} places; use "
            f"a longer max_length, or sinusoidal positions"
        ) from error
