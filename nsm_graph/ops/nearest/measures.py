r"""How alike states are; larger is more alike.

Matrix products are fast and round: equal distances come out different, and close states far from
the origin come out alike. So each measure is known in two ways: roughly, by a product, and exactly,
difference by difference. A bound on the rounding says where the rough one cannot decide.

Legend: B examples, N targets, M sources, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Measure(NamedTuple):
    """A similarity in two ways; both take prepared states."""

    prepare: Callable[[Tensor], Tensor]  #: done first to all states
    is_distance: bool  #: minus the squared distance, or else the product
    error: float  #: most that both ways may err together, see :meth:`unit`

    def rough(self, targets: Tensor, sources: Tensor) -> Tensor:
        """``[B, N, C], [B, M, C] -> [B, N, M]``."""
        products = targets @ sources.mT
        if not self.is_distance:
            return products
        squares = sources.square().sum(-1).unsqueeze(-2)
        return (2 * products).sub_(squares).sub_(targets.square().sum(-1, keepdim=True))

    def exact(self, targets: Tensor, sources: Tensor) -> Tensor:
        """``[..., C], [..., C] -> [...]``, broadcast."""
        if self.is_distance:
            return -(targets - sources).square().sum(-1)
        return (targets * sources).sum(-1)

    def rounding(self, targets: Tensor, sources: Tensor) -> Tensor:
        """How far apart the two ways may lie for every target, ``[..., N]``."""
        largest = sources.square().sum(-1).amax(-1, keepdim=True)
        return torch.maximum(targets.square().sum(-1), largest) * self.unit(targets)

    def unit(self, x: Tensor) -> float:
        """The same where the largest squared norm is one.

        A sum of C terms errs by C / 2 units of rounding of the sum of their sizes. A rough distance
        takes three such sums of at most the largest norm, an exact one of up to four times it.
        """
        return self.error * (x.size(-1) + 4) * torch.finfo(x.dtype).eps


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _scaled(x: Tensor) -> Tensor:
    return x * x.size(-1) ** -0.25


#: Distances; distances of directions; scores of attention without projections.
MEASURES = {
    "euclidean": Measure(lambda x: x, True, 4.0),
    "cosine": Measure(_unit, True, 4.0),
    "attention": Measure(_scaled, False, 1.0),
}
