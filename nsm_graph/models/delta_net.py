"""A rival of the ordered scan: DeltaNet and DeltaProduct, a matrix per head and no state nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm_graph.models.baselines import Baseline, RecurrentState
from nsm_graph.nn.token_convolution import TokenConvolution
from nsm_graph.ops.delta_scan import DeltaSteps, delta_scan
from nsm_graph.ops.delta_scan.tokens import unit
from nsm_graph.partition import Partition


class DeltaNetLayer(nn.Module):
    r"""One layer: a delta rule over a matrix per head, then a feed-forward block.

    .. math::
        Z \leftarrow Z + \beta_{ir} k_{ir} (v_{ir} - Z^\top k_{ir})^\top, \quad r = 1..R, \qquad
        y_i = Z^\top q_i, \qquad \beta \in (0, 2)

    Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule, 2024; several
    corrections a token: Siems et al., DeltaProduct, 2025; :math:`\beta` up to 2: Grazzi et al.,
    Unlocking State-Tracking, 2024. Differs: a convolution of width two instead of four.
    """

    def __init__(self, channels: int, heads: int, reflections: int) -> None:
        super().__init__()
        self.heads, self.reflections, self.width = heads, reflections, channels // heads
        self.norm = nn.LayerNorm(channels)
        self.convolution = TokenConvolution(channels)
        self.lin_query = nn.Linear(channels, channels)
        self.lin_key = nn.Linear(channels, reflections * channels)
        self.lin_value = nn.Linear(channels, reflections * channels)
        self.lin_beta = nn.Linear(channels, reflections * heads)
        self.head_norm = nn.LayerNorm(self.width)
        self.lin_out = nn.Linear(channels, channels)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
        )

    def forward(
        self, x: Tensor, layout: Partition, memory: Tensor, tail: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[T, C]``, the memory ``[B, H, D, D]`` and the tail ``[B, C]`` after them."""
        normed = self.norm(x)
        mixed = layout.pad(self.convolution(normed, layout, tail))
        tail = TokenConvolution.next_tail(normed, layout, tail)
        heads = (self.heads, self.reflections)
        steps = DeltaSteps(
            unit(self.lin_key(mixed).unflatten(-1, (*heads, self.width))),
            2 * self.lin_beta(mixed).unflatten(-1, heads).sigmoid(),
            self.lin_value(mixed).unflatten(-1, (*heads, self.width)),
        )
        query = unit(self.lin_query(mixed).unflatten(-1, (self.heads, self.width)))
        real = None if layout.is_uniform else layout.mask()
        memory, read = delta_scan(memory, steps.only(real), query=query)
        assert read is not None
        x = x + self.lin_out(layout.unpad(self.head_norm(read).flatten(2)))
        return x + self.feed_forward(x), memory, tail


class DeltaNetBaseline(Baseline):
    r"""A stack of :class:`DeltaNetLayer` over ragged sequences.

    The prediction comes from the last token (`head="example"`) or from every token; a token sees
    itself and what came before. An example without tokens keeps its state.

    Args:
        in_channels: Features of a token, or its number of symbol columns with `num_embeddings`.
        channels: Width of a token; a multiple of `heads`.
        out_channels: Size of the prediction.
        heads: Heads.  (default: :obj:`4`)
        num_layers: Layers.  (default: :obj:`1`)
        reflections: Corrections a token; 1 is DeltaNet, more are DeltaProduct.
            (default: :obj:`2`)
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
        num_layers: int = 1,
        reflections: int = 2,
        num_embeddings: int | list[int] | None = None,
        pe_channels: int | None = None,
        head: str = "example",
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__(
            *(in_channels, channels, out_channels, num_embeddings, pe_channels, head),
            tie_embeddings,
        )
        for name, value in (
            ("heads", heads),
            ("num_layers", num_layers),
            ("reflections", reflections),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1; got {value}")
        if channels % heads:
            raise ValueError(f"channels: expected a multiple of heads={heads}; got {channels}")
        self.heads = heads
        self.layers = nn.ModuleList(
            DeltaNetLayer(channels, heads, reflections) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(channels)

    def read(
        self, tokens: Tensor, layout: Partition, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        width = self.channels // self.heads
        shape = (len(self.layers), layout.num_examples)
        if state is None:
            memories = tokens.new_zeros(*shape, self.heads, width, width)
            state = RecurrentState(
                (
                    memories,
                    tokens.new_zeros(*shape, self.channels),
                    tokens.new_zeros(1, *shape[1:], self.channels),
                )
            )
        expected = (*shape, self.heads, width, width)
        if len(state.tensors) != 3 or state.tensors[0].shape != expected:
            got = ", ".join(str(tuple(tensor.shape)) for tensor in state.tensors)
            raise ValueError(f"state: expected memories of shape {expected}; got {got}")
        memories, tails, last = state.tensors
        hidden, after = tokens, []
        for layer, memory, tail in zip(self.layers, memories, tails, strict=True):
            hidden, memory, tail = layer(hidden, layout, memory, tail)
            after.append((memory, tail))
        last = TokenConvolution.next_tail(hidden, layout, last[0]).unsqueeze(0)
        memory_tensors, tail_tensors = (torch.stack(part) for part in zip(*after, strict=True))
        state = RecurrentState((memory_tensors, tail_tensors, last))
        return self.norm(last[0] if self.head == "example" else hidden), state
