"""What the loop over segments is given beside states and tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoopWeights(NamedTuple):
    """What the cell has learned; matrices are ``[out, in]``, as in ``torch.nn.Linear``.

    An LSTM has no candidate's: they are None, and `gates` is [4 C, 2 C]: input, forget and output
    gate and candidate from (state, update). Without communication the last six are None.
    """

    query: Tensor  #: [C, C]
    query_bias: Tensor
    out: Tensor  #: [C, C], of attention
    out_bias: Tensor
    gates: Tensor  #: [2 C, 2 C], reset and update from (state, update)
    gates_bias: Tensor
    candidate: Tensor | None  #: [C, 2 C], from (reset * state, update)
    candidate_bias: Tensor | None
    qkv: Tensor | None  #: [3 C, C], of communication
    qkv_bias: Tensor | None
    mix: Tensor | None  #: [C, C], its output
    mix_bias: Tensor | None
    scale: Tensor | None  #: [C], of its norm
    shift: Tensor | None


class LoopSegments(NamedTuple):
    """Which tokens and which examples each step of the loop concerns, int64 on the host."""

    token_ptr: Tensor  #: [groups + 1], groups step by step, examples in order within a step
    num_active: Tensor  #: [steps], examples that still read: the first ones
