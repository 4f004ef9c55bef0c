"""What a delta scan reads: one step for each token.

Legend: B examples, S tokens, R corrections a token, H heads; a memory has P rows and Q columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class DeltaSteps(NamedTuple):
    """What each token does to the memory, in this order: correct R times, decay, write."""

    key_BSHRP: Tensor  #: where to correct; unit norm, or zero for no effect
    beta_BSHR: Tensor  #: how far: 0 leaves, 1 replaces, 2 reflects
    value_BSHRQ: Tensor | None = None  #: what the key should hold; None = nothing (zero)
    decay_BSH: Tensor | None = None  #: what is kept, in [0, 1]; None = all
    row_BSHP: Tensor | None = None  #: the write is this row ...
    column_BSQ: Tensor | None = None  #: ... times this column
    gate_BSQ: Tensor | None = None  #: share of each correction that a column takes; None = all

    @property
    def num_tokens(self) -> int:
        return self.key_BSHRP.size(1)

    def only(self, real_BS: Tensor | None) -> DeltaSteps:
        """The same steps, without effect where ``real_BS`` is false."""
        if real_BS is None:
            return self
        real = real_BS[..., None, None]
        decay = self.decay_BSH
        return self._replace(
            beta_BSHR=self.beta_BSHR * real,
            decay_BSH=None if decay is None else decay.masked_fill(~real_BS.unsqueeze(-1), 1.0),
            row_BSHP=None if self.row_BSHP is None else self.row_BSHP * real,
        )

    def pad(self, num_tokens: int) -> DeltaSteps:
        """The same steps followed by steps without effect, up to ``num_tokens``."""
        missing = num_tokens - self.num_tokens
        if missing == 0:
            return self
        padded = {
            name: pad_tokens(steps, missing)
            for name, steps in self._asdict().items()
            if steps is not None
        }
        if self.decay_BSH is not None:
            padded["decay_BSH"] = pad_tokens(self.decay_BSH, missing, value=1.0)
        return DeltaSteps(**padded)


def pad_tokens(steps: Tensor, missing: int, value: float = 0.0) -> Tensor:
    """``[B, S, ...]`` -> ``[B, S + missing, ...]``."""
    return F.pad(steps, (0, 0) * (steps.dim() - 2) + (0, missing), value=value)
