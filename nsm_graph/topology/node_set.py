"""What a rule is applied to: the nodes of a batch, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsm_graph.partition import Partition


@dataclass(frozen=True, eq=False)
class NodeSet:
    """The nodes a rule is applied to.

    Args:
        nodes: How the nodes fall into examples.
        x: Current features (the states), ``[N, C]``, for dynamic rules.
        slots: Slot of each node, ``[N]``.
        step: Which segment or pass this is.
        attributes: Anything else a rule wants to read, one row per node.
    """

    nodes: Partition
    x: Tensor | None = None
    slots: Tensor | None = None
    step: int = 0
    attributes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_counts(
        cls,
        counts: list[int],
        x: Tensor | None = None,
        *,
        attributes: dict[str, Tensor] | None = None,
    ) -> NodeSet:
        """A node set with the given number of nodes in each example.

        Raises:
            ValueError: If a count is negative, or ``x`` or an attribute has not one row per node.
        """
        if min(counts, default=0) < 0 or (x is not None and x.size(0) != sum(counts)):
            rows = "" if x is None else f", and one row of x for each ({x.size(0)} given)"
            raise ValueError(f"counts must be numbers of nodes{rows}, but are {counts}")
        attributes = {} if attributes is None else attributes
        for name, rows_of in attributes.items():
            if rows_of.dim() == 0 or rows_of.size(0) != sum(counts):
                raise ValueError(
                    f"attribute {name!r} must have one row for each of the {sum(counts)} nodes, "
                    f"but has shape {tuple(rows_of.shape)}"
                )
        known = [x, *attributes.values()]
        device = next((rows.device for rows in known if rows is not None), None)
        ptr = torch.tensor([0, *counts], device=device).cumsum(0)
        return cls(Partition.from_ptr(ptr), x, attributes=attributes)

    @property
    def ptr(self) -> Tensor:
        return self.nodes.ptr

    @property
    def num_nodes(self) -> int:
        return self.nodes.num_rows

    @property
    def batch(self) -> Tensor:
        """The example of every node, ``[N]``."""
        return self.nodes.batch

    @property
    def position(self) -> Tensor:
        """The index of every node inside its example, ``[N]``."""
        return self.nodes.place
