r"""The rivals of the machine: GRU, LSTM and Transformer, called exactly as the machine is called.

Ragged in, ragged out. Inside, sequences are packed (recurrent) or masked (Transformer), so that an
example's result never depends on its neighbours in the batch. Nodes of a graph are read in their
given order and edges are ignored: on graphs these are structure-free references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nsm_graph.models.embedding import TokenEmbedding, tied_output
from nsm_graph.models.heads import HEADS
from nsm_graph.models.options import check_at, check_batch
from nsm_graph.nn import SinusoidalPosition
from nsm_graph.nn.checks import check_choice
from nsm_graph.partition import Partition


@dataclass
class RecurrentState:
    """What a recurrent baseline carries from one call to the next."""

    tensors: tuple[Tensor, ...]

    def detach(self) -> RecurrentState:
        return RecurrentState(tuple(tensor.detach() for tensor in self.tensors))


class BaselineOutput(NamedTuple):
    """The prediction, and the state to carry on with (:obj:`None` for a model without one)."""

    out: Tensor
    state: RecurrentState | None


class Baseline(nn.Module):
    """What the rivals share: the machine's call, tokens in, a linear head; `read` is their own."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        num_embeddings: int | list[int] | None,
        pe_channels: int | None,
        head: str,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        check_choice("head", head, HEADS)
        self.channels, self.head, self.pe_channels = channels, head, pe_channels
        self.embedding = TokenEmbedding(in_channels, channels, num_embeddings)
        self.encoding = None if pe_channels is None else nn.Linear(pe_channels, channels)
        self.out: nn.Module = nn.Linear(channels, out_channels)
        if tie_embeddings:
            self.out = tied_output(self.embedding, channels, out_channels)

    def read(
        self, tokens: Tensor, layout: Partition, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Features of each example or token, as the head needs them, and the state after."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        *,
        batch_size: int | None = None,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        pe: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """The prediction; edges are accepted, as the machine does, and ignored."""
        return self.run(x, batch, batch_size=batch_size, pe=pe, at=at).out

    def run(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        state: RecurrentState | None = None,
        *,
        batch_size: int | None = None,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        pe: Tensor | None = None,
        at: Tensor | None = None,
    ) -> BaselineOutput:
        """The prediction (for the tokens `at`, where given) and the state after the last token."""
        self.embedding.check(x)
        check_at(at, x.size(0), self.head != "example")
        if state is not None and batch_size is None:
            batch_size = state.tensors[0].size(1)
        layout = Partition.from_ptr(check_batch(x, batch, batch_size))
        features, state = self.read(self._encode(self.embedding(x), pe), layout, state)
        return BaselineOutput(self.out(features if at is None else features[at]), state)

    def _encode(self, tokens: Tensor, pe: Tensor | None) -> Tensor:
        got = None if pe is None else tuple(pe.shape)
        if got != (None if self.pe_channels is None else (tokens.size(0), self.pe_channels)):
            raise ValueError(f"pe: expected pe_channels={self.pe_channels}; got {got or 'nothing'}")
        return tokens if self.encoding is None else tokens + self.encoding(pe)

    def extra_repr(self) -> str:
        return f"{self.channels}, head={self.head}"


class RecurrentBaseline(Baseline):
    r"""A one-layer GRU or LSTM over ragged sequences.

    The prediction comes from the last hidden state (`head="example"`) or from every step
    (`"token"`, `"next_token"`). An example without tokens keeps its state.

    Args:
        in_channels: Features of a token, or its number of symbol columns with `num_embeddings`.
        channels: Width of the hidden state.
        out_channels: Size of the prediction.
        cell: ``"gru"`` or ``"lstm"``.  (default: :obj:`"gru"`)
        num_embeddings: Number of symbols, one for all columns or one per column.
            (default: :obj:`None`)
        pe_channels: Size of a positional encoding of the tokens.  (default: :obj:`None`)
        head: ``"example"``, ``"token"`` or ``"next_token"``.  (default: :obj:`"example"`)
        tie_embeddings: One table of symbols for input and output.  (default: :obj:`False`)

    Shapes:
        - **input:** tokens :math:`(T, C)` or symbols :math:`(T)`, `batch` :math:`(T)`
        - **output:** :math:`(B, K)` for `head="example"`, else :math:`(T, K)`

    Raises:
        ValueError: If an option is unknown, or an input disagrees with the sizes above.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        cell: str = "gru",
        num_embeddings: int | list[int] | None = None,
        pe_channels: int | None = None,
        head: str = "example",
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__(
            *(in_channels, channels, out_channels, num_embeddings, pe_channels, head),
            tie_embeddings,
        )
        cells = {"gru": nn.GRU, "lstm": nn.LSTM}
        check_choice("cell", cell, tuple(cells))
        self.cell = cell
        self.recurrence = cells[cell](channels, channels, batch_first=True)

    def read(
        self, tokens: Tensor, layout: Partition, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        shape = (1, layout.num_examples, self.channels)
        num_tensors = 2 if self.cell == "lstm" else 1
        before = (tokens.new_zeros(shape),) * num_tensors if state is None else state.tensors
        if any(tensor.shape != shape for tensor in before) or len(before) != num_tensors:
            got = ", ".join(str(tuple(tensor.shape)) for tensor in before)
            raise ValueError(f"state: expected {num_tensors} of shape {shape}; got {got}")
        if layout.num_rows == 0:
            return (before[0][0] if self.head == "example" else tokens), RecurrentState(before)
        # An example without tokens is packed as one zero token, whose effect is undone below.
        lengths = layout.ptr.diff()
        packed = pack_padded_sequence(
            layout.pad(tokens), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        steps, last = self.recurrence(packed, before if self.cell == "lstm" else before[0])
        last = last if isinstance(last, tuple) else (last,)
        has_read = (lengths > 0).view(1, -1, 1)
        after = tuple(torch.where(has_read, n, o) for n, o in zip(last, before, strict=True))
        if self.head == "example":
            return after[0][0], RecurrentState(after)
        hidden, _ = pad_packed_sequence(steps, batch_first=True, total_length=layout.max_count)
        return layout.unpad(hidden), RecurrentState(after)


class TransformerBaseline(Baseline):
    r"""A pre-norm Transformer encoder over ragged sequences, with sinusoidal positions.

    The prediction comes from the mean over an example's tokens (`head="example"`) or from every
    token; with `head="next_token"` a token sees only itself and what came before. It carries
    nothing from call to call.

    Args:
        in_channels: Features of a token, or its number of symbol columns with `num_embeddings`.
        channels: Width of a token; a multiple of `heads`.
        out_channels: Size of the prediction.
        heads: Attention heads.  (default: :obj:`4`)
        num_layers: Encoder layers.  (default: :obj:`2`)
        dropout: Dropout in every layer.  (default: :obj:`0.0`)
        num_embeddings: Number of symbols, one for all columns or one per column.
            (default: :obj:`None`)
        pe_channels: Size of a positional encoding of the tokens.  (default: :obj:`None`)
        head: ``"example"``, ``"token"`` or ``"next_token"``.  (default: :obj:`"example"`)
        tie_embeddings: One table of symbols for input and output.  (default: :obj:`False`)

    Shapes:
        - **input:** tokens :math:`(T, C)` or symbols :math:`(T)`, `batch` :math:`(T)`
        - **output:** :math:`(B, K)` for `head="example"`, else :math:`(T, K)`

    Raises:
        ValueError: If an option is unknown, or an input disagrees with the sizes above.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.0,
        num_embeddings: int | list[int] | None = None,
        pe_channels: int | None = None,
        head: str = "example",
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__(
            *(in_channels, channels, out_channels, num_embeddings, pe_channels, head),
            tie_embeddings,
        )
        if channels % heads:
            raise ValueError(f"channels: expected a multiple of heads={heads}; got {channels}")
        # Built one by one: TransformerEncoder copies one layer, and all would start equal.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels, heads, 4 * channels, dropout, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.position = SinusoidalPosition(channels)
        self.norm = nn.LayerNorm(channels)

    def read(
        self, tokens: Tensor, layout: Partition, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        if layout.num_rows == 0:
            empty = tokens.new_zeros(layout.num_examples, self.channels)
            return (empty if self.head == "example" else tokens), None
        hidden = layout.pad(self.position(tokens, layout.place))
        # The first column is never hidden: a softmax over nothing is NaN, and what an example
        # without tokens would read is dropped by `unpad`.
        is_hidden = ~layout.mask()
        is_hidden[:, 0] = False
        column = torch.arange(hidden.size(1), device=tokens.device)
        causal = column > column.unsqueeze(1) if self.head == "next_token" else None
        for layer in self.layers:
            hidden = layer(hidden, src_mask=causal, src_key_padding_mask=is_hidden)
        features = self.norm(layout.unpad(hidden))
        if self.head != "example":
            return features, None
        total = features.new_zeros(layout.num_examples, self.channels)
        total = total.index_add(0, layout.batch, features)
        return total / layout.ptr.diff().clamp(min=1).unsqueeze(1), None


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def match_parameters(make: Callable[[int], nn.Module], target: int, *, step: int = 1) -> int:
    """The width, a multiple of `step`, at which `make(width)` has its parameter count nearest to
    `target`.

    Args:
        make: Builds a model of a given width; the count must grow with the width.
        target: Trainable parameters to come near to.
        step: Widths tried are multiples of this (heads, for attention).  (default: :obj:`1`)
    """
    if target < 1 or step < 1:
        raise ValueError(f"target, step: expected at least 1; got {target}, {step}")

    def count(multiple: int) -> int:
        with torch.device("meta"):  # sizes only: nothing is allocated, no random number is drawn
            return count_parameters(make(multiple * step))

    low, high = 0, 1
    while count(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    if low and target - count(low) <= count(high) - target:
        return low * step
    return high * step
