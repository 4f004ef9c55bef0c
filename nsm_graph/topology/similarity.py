r"""How alike states are, and which are the most alike: quickly, and exactly.

Matrix products are fast and round: equal distances come out different, and close states far from
the origin come out alike. So products only nominate candidates, whose similarity is then computed
difference by difference. A bound on the rounding says whether a candidate could have been missed;
the few rows where it could are computed in full.

Legend: B examples, N targets, M sources, C channels; K candidates of a target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Candidates beyond the k that are asked for.
SLACK = 4

#: Up to so many sources, everything is computed in full.
MAX_EXACT = 128


class Measure(NamedTuple):
    """A similarity of which two ways to compute it are known."""

    #: Done first to all states, so that the other two see what they compare.
    prepare: Callable[[Tensor], Tensor]
    #: ``[B, N, C], [B, M, C] -> [B, N, M]`` by a matrix product
    rough: Callable[[Tensor, Tensor], Tensor]
    #: ``[..., C], [..., C] -> [...]``, equal numbers for equal pairs
    exact: Callable[[Tensor, Tensor], Tensor]
    #: In units of the largest squared norm, how far apart the two may be.
    scale: float


def _rough_distance(targets: Tensor, sources: Tensor) -> Tensor:
    squared_BM = sources.square().sum(-1)
    rough_BNM = torch.baddbmm(squared_BM.unsqueeze(1), targets, sources.mT, beta=-1, alpha=2)
    return rough_BNM.sub_(targets.square().sum(-1, keepdim=True))


def _exact_distance(targets: Tensor, sources: Tensor) -> Tensor:
    return -(targets - sources).square().sum(-1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _scaled(x: Tensor) -> Tensor:
    return x * x.size(-1) ** -0.25


def _rough_product(targets: Tensor, sources: Tensor) -> Tensor:
    return targets @ sources.mT


def _exact_product(targets: Tensor, sources: Tensor) -> Tensor:
    return (targets * sources).sum(-1)


#: Minus the squared distance; minus that of directions; the score of attention without projections.
MEASURES = {
    "euclidean": Measure(lambda x: x, _rough_distance, _exact_distance, 8.0),
    "cosine": Measure(_unit, _rough_distance, _exact_distance, 8.0),
    "attention": Measure(_scaled, _rough_product, _exact_product, 2.0),
}


class Excluded(NamedTuple):
    """What must not be chosen."""

    padding: Tensor | None  #: ``[B, M]``, true where there is no source; None = nowhere
    itself: bool  #: whether a node must not choose itself

    def apply(self, similarity: Tensor) -> Tensor:
        """Makes the least similar of them, in place."""
        if self.padding is not None:
            similarity.masked_fill_(self.padding.unsqueeze(1), -torch.inf)
        if self.itself:
            similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return similarity


def nearest(
    measure: Measure, targets: Tensor, sources: Tensor, k: int, excluded: Excluded
) -> Tensor:
    """The k most similar sources of every target, ``[B, N, k]``; ties go to the lowest index.

    Args:
        measure: Compares them.
        targets: ``[B, N, C]``.
        sources: ``[B, M, C]``.
        k: At most as many as are not excluded.
        excluded: What must not be chosen.
    """
    num_examples, num_sources, num_channels = sources.shape
    if num_sources <= max(MAX_EXACT, 2 * (k + SLACK)):
        return best(excluded.apply(_in_full(measure, targets, sources)), k)
    rough_BNM = excluded.apply(measure.rough(targets, sources))
    value_BNK, index_BNK = _top(rough_BNM, k + SLACK)
    # By index first, so that a stable sort by similarity leaves ties in that order.
    index_BNK = index_BNK.sort(-1).values
    first = torch.arange(num_examples, device=sources.device).view(-1, 1, 1) * num_sources
    rows = sources.flatten(0, 1).index_select(0, (index_BNK + first).flatten())
    exact_BNK = measure.exact(targets.unsqueeze(2), rows.view(*index_BNK.shape, num_channels))
    # Excluded ones are nominated where there are few others.
    exact_BNK.masked_fill_(rough_BNM.gather(2, index_BNK) == -torch.inf, -torch.inf)
    exact_BNK, order = exact_BNK.sort(dim=-1, descending=True, stable=True)
    chosen_BNk = index_BNK.gather(2, order[..., :k])
    # A source that was not nominated is at most as similar as the last that was, but for rounding.
    missed = value_BNK.amin(-1) + _rounding(measure, targets, sources)
    is_unsure = exact_BNK[..., k - 1] <= missed
    if bool(is_unsure.any()):
        _choose_in_full(measure, targets, sources, chosen_BNk, rough_BNM == -torch.inf, is_unsure)
    return chosen_BNk


def _choose_in_full(
    measure: Measure,
    targets: Tensor,
    sources: Tensor,
    chosen_BNk: Tensor,
    is_out_BNM: Tensor,
    is_unsure_BN: Tensor,
) -> None:
    """Chooses again, in place, for some targets: a few at a time, all sources of each."""
    for rows in is_unsure_BN.nonzero().split(64):
        b, n = rows.unbind(1)
        full = measure.exact(targets[b, n].unsqueeze(1), sources[b])
        full.masked_fill_(is_out_BNM[b, n], -torch.inf)
        chosen_BNk[b, n] = best(full, chosen_BNk.size(-1))


def best(similarity: Tensor, k: int) -> Tensor:
    """The k largest along the last dimension; ties go to the lowest index."""
    # topk promises no order among equals.
    return similarity.argsort(dim=-1, descending=True, stable=True)[..., :k]


def above(
    measure: Measure, targets: Tensor, sources: Tensor, least: float, excluded: Excluded
) -> Tensor:
    """``[B, N, M]``, true where the similarity is at least so much."""
    if sources.size(1) <= MAX_EXACT:
        return excluded.apply(_in_full(measure, targets, sources)) >= least
    rough_BNM = excluded.apply(measure.rough(targets, sources))
    is_above = rough_BNM >= least
    error = _rounding(measure, targets, sources).unsqueeze(-1)
    b, n, m = ((rough_BNM - least).abs() <= error).nonzero(as_tuple=True)
    is_above[b, n, m] = measure.exact(targets[b, n], sources[b, m]) >= least
    return is_above


def _in_full(measure: Measure, targets: Tensor, sources: Tensor) -> Tensor:
    return measure.exact(targets.unsqueeze(2), sources.unsqueeze(1))


def _rounding(measure: Measure, targets: Tensor, sources: Tensor) -> Tensor:
    """A bound on the error of the rough similarities of every target, ``[B, N]``."""
    largest = sources.square().sum(-1).amax(-1, keepdim=True)
    norms = torch.maximum(targets.square().sum(-1), largest)
    return norms * (torch.finfo(sources.dtype).eps * measure.scale * (sources.size(-1) + 4) ** 0.5)


def _top(values_BNM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, in any order. The k groups with the largest entries hold them all."""
    num_sources = values_BNM.size(-1)
    num_groups = 128
    size = num_sources // num_groups
    if size < 4 or num_groups <= 2 * k:
        return values_BNM.topk(k, sorted=False)
    # Every so manieth entry is a group: then the largest of each are found row by row.
    whole_BNSG = values_BNM[..., : size * num_groups].unflatten(2, (size, num_groups))
    group_BNk1 = whole_BNSG.amax(2).topk(k, sorted=False).indices.unsqueeze(-1)
    entries = torch.arange(size, device=group_BNk1.device) * num_groups
    rest = torch.arange(size * num_groups, num_sources, device=group_BNk1.device)
    index = (group_BNk1 + entries).flatten(2)
    index = torch.cat([index, rest.expand(*index.shape[:2], -1)], 2)
    value, found = values_BNM.gather(2, index).topk(k, sorted=False)
    return value, index.gather(2, found)
