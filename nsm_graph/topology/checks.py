"""What rules refuse, said in one way: the rule, what it expected, what it got, and where."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.topology.node_set import NodeSet


def at_least(rule: str, name: str, value: int, least: int) -> None:
    """Raises unless an argument is an integer of at least so much."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < least:
        end = "" if is_integer else ", no integer"
        raise ValueError(f"{rule} needs {name} >= {least}, but {name} is {value!r}{end}")


def show_rows(values: Tensor, is_wrong: Tensor) -> str:
    """The first few values of which something is said: ``row 3: nan, row 7: inf and 2 more``."""
    wrong = is_wrong.nonzero().flatten()
    shown = [f"row {row}: {values[row].tolist()}" for row in wrong[:3].tolist()]
    more = wrong.numel() - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def check_enough(rule: object, needed: int, sources: NodeSet, targets: NodeSet) -> None:
    """Raises unless every example with a target has so many sources; shows those that have not."""
    counts = sources.ptr.diff()
    if sources.nodes.min_count >= needed:
        return
    is_short = (counts < needed) & (targets.ptr.diff() > 0)
    if bool(is_short.any()):
        fewest = int(counts[is_short].min())
        shown = ", ".join(map(str, is_short.nonzero().flatten()[:3].tolist()))
        raise ValueError(
            f"{rule!r} needs more than {needed - 1} nodes in every example, but one has {fewest}; "
            f"use a smaller k or more nodes (examples {shown}, of {counts.numel()})"
        )


def check_states(rule: object, nodes: NodeSet) -> Tensor:
    """The current states of a node set, or a ``ValueError``."""
    if nodes.x is None:
        raise ValueError(f"{rule!r} reads the current states, but the node set has no x")
    if nodes.x.dim() != 2 or nodes.x.size(0) != nodes.num_nodes:
        raise ValueError(
            f"{rule!r} needs x of shape ({nodes.num_nodes}, channels), but it has "
            f"{tuple(nodes.x.shape)}"
        )
    return nodes.x.detach()


def find_cycle(parents: list[int]) -> list[int]:
    """Nodes of a cycle in a list of parents (-1: none), or an empty list."""
    state = [0] * len(parents)  # 0 = new, 1 = on the way, 2 = leads to a root
    for start in range(len(parents)):
        way, node = [], start
        while node >= 0 and state[node] == 0:
            state[node] = 1
            way.append(node)
            node = parents[node]
        if node >= 0 and state[node] == 1:
            return way[way.index(node) :]
        for seen in way:
            state[seen] = 2
    return []


def as_cpu_index(values: Tensor) -> Tensor:
    """An int64 copy on the CPU, where patterns are worked out."""
    return values.detach().to("cpu", torch.long)
