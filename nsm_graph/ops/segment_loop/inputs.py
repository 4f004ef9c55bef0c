"""What the loop over segments is given beside states and tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoopWeights(NamedTuple):
    """What the cell has learned; matrices are ``[out, in]``, as in ``torch.nn.Linear``.

    Of the C channels of a state the first K are kept, and the last G = C - K gated: the rows of
    `gates` say how many. An LSTM has no candidate's weights: they are None, and `gates` is
    [4 G, 2 C]: input, forget and output gate and candidate from (gated, update, kept). Without
    communication the last six are None.
    """

    query: Tensor  #: [C, C], from (kept, gated)
    query_bias: Tensor
    out: Tensor  #: [C, C], of attention
    out_bias: Tensor
    gates: Tensor  #: [2 G, G + C + K = 2 C], reset and update from (gated, update, kept)
    gates_bias: Tensor
    candidate: Tensor | None  #: [G, 2 C], from (reset * gated, update, kept)
    candidate_bias: Tensor | None
    qkv: Tensor | None  #: [3 G, G], of communication
    qkv_bias: Tensor | None
    mix: Tensor | None  #: [G, G], its output
    mix_bias: Tensor | None
    scale: Tensor | None  #: [G], of its norm
    shift: Tensor | None

    @property
    def gated(self) -> int:
        """G."""
        return self.gates.size(0) // (4 if self.candidate is None else 2)


class TokenResults(NamedTuple):
    """What reading tokens into states gives."""

    after: Tensor  #: [groups N, C], states after every step
    final: Tensor  #: [B N, C], after the last of each example
    mass: Tensor  #: [groups N], the routing weight that each state received of each group
    cell: Tensor | None  #: [B N, G], an LSTM's last one
    reads: Tensor | None  #: [tokens, channels of the scan], what tokens read from a scan


class LoopSegments(NamedTuple):
    """Which tokens and which examples each step of the loop concerns, int64 on the host."""

    token_ptr: Tensor  #: [groups + 1], groups step by step, examples in order within a step
    num_active: Tensor  #: [steps], examples that still read: the first ones
