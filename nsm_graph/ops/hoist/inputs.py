"""What hoisting is given beside tokens, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HoistWeights(NamedTuple):
    """Projections of tokens; matrices are ``[out, in]``, as in ``torch.nn.Linear``.

    ``value`` and ``value_bias`` are None where values are keys.
    """

    key: Tensor  #: [C, C_t]
    key_bias: Tensor  #: [C]
    value: Tensor | None  #: [C, C_t]
    value_bias: Tensor | None
    logits: Tensor  #: [H N, C_t], the router's, head by head, of the N states of an example
    logits_bias: Tensor  #: [H N]
    out: Tensor  #: [C, C_t], of routed sums
    out_bias: Tensor  #: [C]


class TokenGroups(NamedTuple):
    """Where the tokens of each group (a segment of an example) stand, int64 on the host."""

    first: Tensor  #: [G], its first token among the inputs; the others follow
    ptr: Tensor  #: [G + 1], where its tokens begin in the result


class Hoisted(NamedTuple):
    """Everything about tokens that the loop over segments reads, group by group."""

    key: Tensor  #: [T, C]
    value: Tensor  #: [T, C], the very tensor `key` where values are keys
    routed: Tensor  #: [G N, C], projected routed sums
    weights: Tensor  #: [E], routing weights by group, state and token; constants to autograd
