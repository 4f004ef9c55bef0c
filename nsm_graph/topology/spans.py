"""Rules by place in the example, or by an attribute of the nodes: bands, windows, blocks.

They have a meaning from one node set to another: places (or attributes) are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.relation import Relation
from nsm_graph.topology.base import Pattern, Topology, check_examples
from nsm_graph.topology.checks import at_least, show_rows
from nsm_graph.topology.node_set import NodeSet
from nsm_graph.topology.rows import Rows, rows_from_keys, rows_from_ranges, rows_from_table


def band(width: int, by: str | None = None) -> Topology:
    r"""Each node from all at most ``width`` places before or after it, itself included.

    Args:
        width: The farthest a source may lie from its target.
        by: Name of a node attribute to measure by; ``None`` for the place in the example.
            (default: :obj:`None`)

    Raises:
        ValueError: If ``width`` is negative; when asked, if the nodes lack the attribute.

    Example:
        >>> band(1)(NodeSet.from_counts([4])).csr.index
        tensor([0, 1, 0, 1, 2, 1, 2, 3, 2, 3], dtype=torch.int32)
    """
    at_least("band(width)", "width", width, 0)
    return _span(f"band({width}", width, width, by)


def window(width: int, by: str | None = None) -> Topology:
    r"""Each node from itself and the ``width`` before it: ``band(width) & causal()``.

    Args:
        width: How far back a target looks.
        by: As in :func:`band`. (default: :obj:`None`)

    Example:
        >>> window(1)(NodeSet.from_counts([4])).csr.index
        tensor([0, 0, 1, 1, 2, 2, 3], dtype=torch.int32)
    """
    at_least("window(width)", "width", width, 0)
    return _span(f"window({width}", width, 0, by)


def causal(by: str | None = None) -> Topology:
    r"""Each node from itself and all before it.

    By place it stores no edges: attention over it is a dense triangle per example. There, what lies
    after a target is multiplied by zero, so a NaN or an infinity in a later node may reach earlier
    targets of its own example; no number does.

    Args:
        by: As in :func:`band`: nodes with an equal attribute see each other.
            (default: :obj:`None`)

    Example:
        >>> causal()(NodeSet.from_counts([3])).csr.index
        tensor([0, 0, 1, 0, 1, 2], dtype=torch.int32)
    """
    return Causal() if by is None else AttributeSpan("causal(", None, 0, by)


def dilated(width: int, dilation: int) -> Topology:
    r"""Each node from itself and ``width`` on either side, ``dilation`` places apart.

    Example:
        >>> dilated(1, 3)(NodeSet.from_counts([5])).csr.index
        tensor([0, 3, 1, 4, 2, 0, 3, 1, 4], dtype=torch.int32)
    """
    return Dilated(width, dilation)


def blocks(num_blocks: int | None = None, *, by: str | None = None) -> Topology:
    r"""Complete inside each block of an example, no edges between blocks.

    Args:
        num_blocks: Into how many blocks of neighbouring places (equal ones, but for rounding) each
            example falls. From one set to another, sources of the first block go to targets of the
            first block, and so on.
        by: Instead: nodes whose attribute of that name is equal form a block.

    Raises:
        ValueError: Unless exactly one is given.

    Example:
        >>> blocks(2)(NodeSet.from_counts([5])).csr.index
        tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 3, 4], dtype=torch.int32)
    """
    if (num_blocks is None) == (by is None):
        raise ValueError(
            f"blocks takes exactly one of num_blocks and by=, but got {num_blocks} and {by!r}"
        )
    if num_blocks is None:
        assert by is not None
        return AttributeSpan("blocks(", 0, 0, by)
    return Blocks(num_blocks)


def _span(name: str, before: int | None, after: int, by: str | None) -> Topology:
    if by is None:
        return Span(f"{name})", before, after)
    return AttributeSpan(name if name.endswith("(") else f"{name}, ", before, after, by)


class Span(Pattern):
    """Sources from so many places before the target to so many after it; ``None`` for all."""

    joins_two_sets = True

    def __init__(self, name: str, before: int | None, after: int) -> None:
        super().__init__()
        self.name, self.before, self.after = name, before, after

    def rows(self, num_src: int, num_dst: int) -> Rows:
        place = torch.arange(num_dst)
        first = torch.zeros_like(place) if self.before is None else (place - self.before)
        end = place + self.after + 1
        return rows_from_ranges(first.clamp(0, num_src), end.clamp(0, num_src))

    def __repr__(self) -> str:
        return self.name


class Causal(Span):
    """Sources up to the target's own place; known without a list where both sets count alike."""

    def __init__(self) -> None:
        super().__init__("causal()", None, 0)

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        targets = sources if targets is None else targets
        check_examples(self, sources, targets)
        if sources.nodes.has_counts_of(targets.nodes):
            return Relation.causal_between(sources.nodes, targets.nodes)
        return super().forward(sources, targets)


class Dilated(Pattern):
    joins_two_sets = True

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        at_least("dilated(width, dilation)", "width", width, 0)
        at_least("dilated(width, dilation)", "dilation", dilation, 1)
        self.width, self.dilation = width, dilation

    def rows(self, num_src: int, num_dst: int) -> Rows:
        offset = torch.arange(-self.width, self.width + 1) * self.dilation
        source = torch.arange(num_dst).unsqueeze(1) + offset
        return rows_from_table(source, (source >= 0) & (source < num_src))

    def __repr__(self) -> str:
        return f"dilated({self.width}, {self.dilation})"


class Blocks(Pattern):
    joins_two_sets = True

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        at_least("blocks(num_blocks)", "num_blocks", num_blocks, 1)
        self.num_blocks = num_blocks

    def rows(self, num_src: int, num_dst: int) -> Rows:
        fewest = min(num_src, num_dst)
        if fewest < self.num_blocks:
            raise ValueError(
                f"{self!r} needs at least {self.num_blocks} nodes in every example, but one has "
                f"{fewest}; use fewer blocks"
            )
        block = torch.arange(num_dst) * self.num_blocks // num_dst
        # The first source whose own block is this one.
        first = -(-block * num_src // self.num_blocks)
        end = -(-(block + 1) * num_src // self.num_blocks)
        return rows_from_ranges(first, end)

    def __repr__(self) -> str:
        return f"blocks({self.num_blocks})"


class AttributeSpan(Topology):
    """Sources whose attribute lies in a range around that of the target, in the same example."""

    def __init__(self, name: str, before: int | None, after: int, by: str) -> None:
        super().__init__()
        self.name, self.before, self.after, self.by = name, before, after, by

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        targets = sources if targets is None else targets
        check_examples(self, sources, targets)
        size = (sources.num_nodes, targets.num_nodes)
        if min(size) == 0:
            nothing = torch.zeros(0, dtype=torch.long, device=sources.ptr.device)
            return Relation.from_rows(nothing, 0, (size[0], size[1]), sources.nodes, targets.nodes)
        # Sorted within each example, a target's sources are a range.
        values_BM = sources.nodes.pad(self._values(sources))
        values_BM = values_BM.masked_fill(~sources.nodes.mask(), torch.inf)
        values_BM, order_BM = values_BM.sort(dim=1, stable=True)
        wanted_BN = targets.nodes.pad(self._values(targets))
        low = -torch.inf if self.before is None else -self.before
        first_BN = torch.searchsorted(values_BM, wanted_BN + low)
        end_BN = torch.searchsorted(values_BM, wanted_BN + self.after, right=True)
        first_N, end_N = targets.nodes.unpad(first_BN), targets.nodes.unpad(end_BN)
        found, _ = rows_from_ranges(first_N, end_N)
        target = torch.arange(size[1], device=found.device)
        target = target.repeat_interleave(end_N - first_N, output_size=found.numel())
        example = targets.batch[target]
        source = sources.ptr[example] + order_BM[example, found]
        keys = (target * size[0] + source).sort().values
        return Relation.from_rows(*rows_from_keys(keys, size), size, sources.nodes, targets.nodes)

    def _values(self, nodes: NodeSet) -> Tensor:
        values = nodes.attributes.get(self.by)
        if values is None:
            known = ", ".join(map(repr, nodes.attributes)) or "no attributes"
            raise ValueError(
                f"{self!r} compares the attribute {self.by!r}, but the node set has {known}; pass "
                f"NodeSet(..., attributes={{{self.by!r}: ...}})"
            )
        if values.shape != (nodes.num_nodes,) or values.is_complex():
            raise ValueError(
                f"{self!r} needs one number for each of the {nodes.num_nodes} nodes, but "
                f"{self.by!r} has shape {tuple(values.shape)} and dtype {values.dtype}"
            )
        values = values.double()
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{self!r} needs finite numbers, but {self.by!r} has others: "
                f"{show_rows(values, ~values.isfinite())}"
            )
        return values

    def __repr__(self) -> str:
        return f"{self.name}by={self.by!r})"
