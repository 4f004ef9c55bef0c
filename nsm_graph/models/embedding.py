"""Input processing (N1): features or symbols to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear


class TokenEmbedding(nn.Module):
    r"""Features through a linear map, or symbols through tables that add up.

    Args:
        in_channels: Channels of a feature token (:obj:`-1` to derive it from the first input), or
            the number of symbol columns.
        channels: Size of each embedded token.
        num_embeddings: Number of symbols (one number, or one for each column); ``None`` for
            features. (default: :obj:`None`)
        name: What to call the input in errors. (default: :obj:`"x"`)

    Shapes:
        - **input:** features :math:`(T, C_{in})`, or symbols :math:`(T,)` or :math:`(T, K)`
        - **output:** tokens :math:`(T, C_t)`

    Example:
        >>> TokenEmbedding(1, 8, num_embeddings=5)(torch.tensor([0, 4, 2])).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_embeddings: int | list[int] | None = None,
        *,
        name: str = "x",
    ) -> None:
        super().__init__()
        self.in_channels, self.channels, self.name = in_channels, channels, name
        self.lin: Linear | None = None
        self.tables = nn.ModuleList()
        if num_embeddings is None:
            self.lin = Linear(in_channels, channels)
            return
        sizes = [num_embeddings] if isinstance(num_embeddings, int) else list(num_embeddings)
        if len(sizes) == 1:
            sizes = sizes * in_channels
        if len(sizes) != in_channels or min(sizes) < 1:
            raise ValueError(
                f"num_embeddings must give one positive size for each of the {in_channels} symbol "
                f"columns (in_channels), but is {num_embeddings}"
            )
        self.tables.extend(nn.Embedding(size, channels) for size in sizes)

    def reset_parameters(self) -> None:
        for module in [*self.tables, self.lin]:
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if self.lin is not None:
            return self.lin(x)
        columns = (x.unsqueeze(1) if x.dim() == 1 else x).long()
        return torch.stack([t(columns[:, i]) for i, t in enumerate(self.tables)]).sum(0)

    def check(self, x: Tensor) -> None:
        """Raises unless ``x`` fits; reads values, so it belongs at eager boundaries only."""
        if self.lin is not None:
            width = "channels" if self.in_channels == -1 else self.in_channels
            if x.dim() != 2 or (self.in_channels != -1 and x.size(1) != self.in_channels):
                raise ValueError(
                    f"{self.name} must have shape (tokens, {width}), but has {tuple(x.shape)}"
                )
            if not x.is_floating_point():
                raise ValueError(
                    f"{self.name} must be floating point, but has dtype {x.dtype}; use .float(), "
                    f"or num_embeddings= for symbols"
                )
            check_finite(x, self.name)
            return
        columns = len(self.tables)
        shapes = f"(tokens, {columns})" + (" or (tokens,)" if columns == 1 else "")
        if x.dim() not in (1, 2) or (1 if x.dim() == 1 else x.size(1)) != columns:
            raise ValueError(f"{self.name} must have shape {shapes}, but has {tuple(x.shape)}")
        if x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(
                f"{self.name} must hold symbols (integers), but has dtype {x.dtype}; use .long()"
            )
        if x.numel() == 0:
            return
        for column, table in zip(x.view(x.size(0), -1).unbind(1), self.tables, strict=True):
            least, most = torch.stack(column.aminmax()).tolist()
            if least < 0 or most >= table.num_embeddings:
                raise ValueError(
                    f"{self.name} holds the symbol {least if least < 0 else most}, but "
                    f"num_embeddings is {table.num_embeddings}; symbols go from 0 to "
                    f"{table.num_embeddings - 1}"
                )


class TiedLinear(nn.Module):
    r"""Scores of all symbols from their own embeddings: :math:`E x / \sqrt{C_t} + b`.

    What is learned about a symbol as input serves it as output, too: with thousands of symbols
    that is most of the learning.

    Args:
        table: The embedding of the symbols.

    Shapes:
        - **input:** :math:`(T, C_t)`
        - **output:** :math:`(T, V)` for V symbols
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self.bias = nn.Parameter(torch.zeros(table.num_embeddings))

    def reset_parameters(self) -> None:
        """The table draws itself."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.weight.size(1) ** -0.5, self.weight, self.bias)


def tied_output(embedding: TokenEmbedding, channels: int, out_channels: int) -> TiedLinear:
    """The output layer that shares an embedding's table, or a ``ValueError``."""
    sizes = [table.num_embeddings for table in embedding.tables]
    if sizes != [out_channels] or channels != embedding.channels:
        raise ValueError(
            f"tie_embeddings predicts the symbols that are read: it needs one column of "
            f"num_embeddings={out_channels} symbols (out_channels), but the input has "
            f"{sizes or 'features'}"
        )
    return TiedLinear(embedding.tables[0])


def check_finite(x: Tensor, name: str) -> None:
    """Raises if any entry is NaN or infinite."""
    # One sum tells: it is NaN or infinite if any entry is (or if finite data overflow).
    if x.numel() > 0 and not bool(torch.isfinite(x.sum())):
        is_bad = ~torch.isfinite(x)
        if bool(is_bad.any()):
            row = int(is_bad.flatten(1).any(1).nonzero()[0])
            raise ValueError(f"{name} holds NaN or infinity, first in row {row}; clean the data")
