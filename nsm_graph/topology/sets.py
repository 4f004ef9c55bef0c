"""Set operations on edges. An edge is the number ``target * M + source``; sets ascend.

Legend: M sources; E edges; keys are the edges of a set.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(left: Tensor, right: Tensor, operator: str) -> Tensor:
    """``|``, ``&`` or ``-`` of two sets."""
    if operator == "|":
        return torch.cat([left, right]).unique()
    is_shared = contains(right, left)
    return left[is_shared if operator == "&" else ~is_shared]


def contains(keys: Tensor, asked: Tensor) -> Tensor:
    """Whether each edge that is asked for is in the set."""
    if keys.numel() == 0:
        return torch.zeros_like(asked, dtype=torch.bool)
    return keys[find(keys, asked)] == asked


def find(keys: Tensor, asked: Tensor) -> Tensor:
    """Where each edge stands in a set that is not empty, or would stand next to."""
    return torch.searchsorted(keys, asked).clamp(max=keys.numel() - 1)


def power(keys: Tensor, num_nodes: int, k: int) -> Tensor:
    """Edges to every node that lies 1 to k steps away; a node reaches itself only by a loop."""
    src, dst = keys % max(num_nodes, 1), keys // max(num_nodes, 1)
    ptr = torch.searchsorted(dst, torch.arange(num_nodes + 1, device=keys.device))
    reached = frontier = keys
    for _ in range(k - 1):
        if frontier.numel() == 0:
            break
        # Each path is made longer at its start: by the edges that enter its source.
        middle, end = frontier % num_nodes, frontier // num_nodes
        degree = ptr[middle + 1] - ptr[middle]
        skipped = degree.cumsum(0) - degree - ptr[middle]
        edge = torch.arange(int(degree.sum()), device=keys.device)
        edge = edge - skipped.repeat_interleave(degree, output_size=edge.numel())
        start, end = src[edge], end.repeat_interleave(degree, output_size=edge.numel())
        longer = (end * num_nodes + start)[start != end].unique()
        frontier = longer[~contains(reached, longer)]
        reached = torch.cat([reached, frontier]).sort().values
    return reached
