"""All pairs of an example are compared, some targets at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsm_graph.ops.nearest.measures import Measure
from nsm_graph.partition import Partition

#: Numbers that are made at a time.
BLOCK = 2**18


def nearest(
    targets: Tensor,
    sources: Tensor,
    k: int,
    measure: Measure,
    target_nodes: Partition,
    source_nodes: Partition,
    without_self: bool,
) -> Tensor:
    """``[N, k]``, ascending; see the package."""
    chosen = [torch.zeros(0, k, dtype=torch.long, device=targets.device)]
    parts = _parts(target_nodes, source_nodes, targets.size(1))
    for rows, columns in parts:
        similarity = measure.exact(targets[rows].unsqueeze(1), sources[columns])
        if without_self:
            _itself(similarity, rows, columns).fill_(-torch.inf)
        chosen.append(best(similarity, k).sort(-1).values + columns.start)
    return torch.cat(chosen)


def best(similarity: Tensor, k: int) -> Tensor:
    """The k largest along the last dimension; ties go to the lowest index."""
    # topk promises no order among equals.
    return similarity.argsort(dim=-1, descending=True, stable=True)[..., :k]


def alike(
    targets: Tensor,
    sources: Tensor,
    least: float,
    measure: Measure,
    target_nodes: Partition,
    source_nodes: Partition,
    without_self: bool,
) -> tuple[Tensor, Tensor]:
    """Pairs of targets and sources; see the package."""
    found = [torch.zeros(0, 2, dtype=torch.long, device=targets.device)]
    for rows, columns in _parts(target_nodes, source_nodes, 1):
        similarity = measure.rough(targets[rows], sources[columns])
        error = measure.rounding(targets[rows], sources[columns]).unsqueeze(1)
        is_unsure = (similarity - least).abs() <= error
        is_alike = similarity >= least
        n, m = is_unsure.nonzero(as_tuple=True)
        is_alike[n, m] = measure.exact(targets[rows][n], sources[columns][m]) >= least
        if without_self:
            _itself(is_alike, rows, columns).fill_(False)
        start = torch.tensor([rows.start, columns.start], device=targets.device)
        found.append(is_alike.nonzero() + start)
    target, source = torch.cat(found).unbind(1)
    return target, source


def _parts(
    target_nodes: Partition, source_nodes: Partition, numbers_per_pair: int
) -> Iterator[tuple[slice, slice]]:
    """Targets that are looked at together, and the sources of their example."""
    ends = target_nodes.ptr.tolist(), source_nodes.ptr.tolist()
    for example in range(target_nodes.num_examples):
        (first, last), (start, end) = (ptr[example : example + 2] for ptr in ends)
        step = max(1, BLOCK // max(1, (end - start) * numbers_per_pair))
        for row in range(first, last, step):
            yield slice(row, min(row + step, last)), slice(start, end)


def _itself(pairs: Tensor, rows: slice, columns: slice) -> Tensor:
    """The pairs of a node and itself."""
    return pairs.diagonal(offset=rows.start - columns.start)
