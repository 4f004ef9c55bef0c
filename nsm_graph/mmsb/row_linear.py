"""A linear layer that is as fast for one row as a processor reads its weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn.dense.linear import Linear


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for rows ``[R, C]``.

    On a CPU the bias of a single row is added afterwards: in one operation with the product it
    takes three times as long as both (1024 x 256: 0.14 ms against 0.04), because the product is
    then computed as one of matrices.
    """
    if bias is not None and x.device.type == "cpu" and x.size(0) == 1:
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


class RowLinear(Linear):
    """PyG's ``Linear`` with :func:`row_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return row_linear(x, self.weight, self.bias)
