r"""Edges of one example, by target, and how they become the edges of a batch.

A rule that depends on nothing but node counts is worked out once for each pair of counts. A batch
repeats these rows with other first nodes: no edge list is built, nothing is sorted.

Legend: M sources, N targets and E edges of one example; D candidates of a target.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.partition import Partition
from nsm_graph.relation import Relation, lasting

#: A rule remembers so many edges, about 20 bytes each, and the last example whatever its size.
MAX_REMEMBERED_EDGES = 2**22


class Rows(NamedTuple):
    """Sources of every target, in ascending order, each once."""

    index: Tensor  # type: ignore[assignment]  #: ``[E]``
    degree: Tensor | int  #: ``[N]``, or one number where all targets have as many


# Ways to say them ##################################################################


def rows_from_table(source_ND: Tensor, is_edge_ND: Tensor | None = None) -> Rows:
    """Rows from a table of candidate sources; repeated ones count once."""
    num_candidates = source_ND.size(1)
    if is_edge_ND is not None:
        # What is no edge goes to the end of its row.
        source_ND = source_ND.masked_fill(~is_edge_ND, torch.iinfo(source_ND.dtype).max)
    source_ND = source_ND.sort(1).values
    is_kept = torch.ones_like(source_ND, dtype=torch.bool)
    is_kept[:, 1:] = source_ND[:, 1:] != source_ND[:, :-1]
    is_kept &= source_ND != torch.iinfo(source_ND.dtype).max
    if bool(is_kept.all()):
        return Rows(source_ND.flatten(), num_candidates)
    return _rows(source_ND[is_kept], is_kept.sum(1))


def rows_from_pairs(src: Tensor, dst: Tensor, size: tuple[int, int]) -> Rows:
    """Rows from edges in any order, repeated ones once."""
    return rows_from_keys((dst * size[0] + src).unique(), size)


def rows_from_keys(keys: Tensor, size: tuple[int, int]) -> Rows:
    """Rows from ascending numbers ``target * M + source``."""
    num_src, num_dst = size
    ends = torch.arange(1, num_dst + 1, device=keys.device) * num_src
    ends = torch.searchsorted(keys, ends)
    return _rows(keys % max(num_src, 1), ends.diff(prepend=ends.new_zeros(1)))


def rows_from_ranges(first_N: Tensor, end_N: Tensor) -> Rows:
    """Rows of targets that have all sources from a first one up to, but without, an end."""
    degree = (end_N - first_N).clamp(min=0)
    skipped = degree.cumsum(0) - degree - first_N
    num_edges = int(degree.sum())
    index = torch.arange(num_edges, device=degree.device)
    return _rows(index - skipped.repeat_interleave(degree, output_size=num_edges), degree)


def _rows(index: Tensor, degree: Tensor) -> Rows:
    """Notices where all targets have as many sources."""
    if degree.numel() > 0 and bool((degree == degree[0]).all()):
        return Rows(index, int(degree[0]))
    return Rows(index, degree)


def keys_of(relation: Relation) -> Tensor:
    """``target * M + source`` of every edge, in the relation's order."""
    src, dst = relation.edge_index
    return dst * max(relation.num_src, 1) + src


# One example, many examples ########################################################


class Memo:
    """Relations of one example that a rule has worked out already, by its numbers of nodes."""

    def __init__(self) -> None:
        self._relations: OrderedDict[tuple, tuple[Relation, int]] = OrderedDict()

    def get(self, key: tuple, make: Callable[[], Relation]) -> Relation:
        """The relation of that name, made where it is not known or somebody wrote into it."""
        if key in self._relations:
            self._relations.move_to_end(key)
            relation, version = self._relations[key]
            if torch.compiler.is_compiling() or relation.version == version:
                return relation
        with lasting():
            relation = make()
        self._relations[key] = relation, relation.version
        while len(self._relations) > 1 and self._num_edges() > MAX_REMEMBERED_EDGES:
            self._relations.popitem(last=False)
        return relation

    def _num_edges(self) -> int:
        return sum(relation.num_edges for relation, _ in self._relations.values())

    def __reduce__(self) -> tuple:
        return Memo, ()  # copies of a rule work it out again


def relation_of_one(rows: Rows, size: tuple[int, int], device: torch.device) -> Relation:
    """The relation of a single example."""
    index, degree = rows
    sources, targets = (Partition.uniform(1, count, device) for count in size)
    targets = sources if size[0] == size[1] else targets
    degree = degree if isinstance(degree, int) else degree.to(device)
    return Relation.from_rows(index.to(device), degree, size, sources, targets)


def tile(one: Callable[[int, int], Relation], sources: Partition, targets: Partition) -> Relation:
    """The relation of a batch, put together from those of its examples."""
    if sources.is_uniform and targets.is_uniform:
        num_examples, device = sources.num_examples, sources.ptr.device
        if num_examples == 0:
            nothing = torch.zeros(0, dtype=torch.long, device=device)
            return Relation.from_rows(nothing, 0, (0, 0), sources, targets)
        example = one(sources.max_count, targets.max_count)
        if num_examples == 1:
            return example
        first = torch.arange(num_examples, device=device) * sources.max_count
        examples = [example] * num_examples
    else:
        sizes = zip(sources.ptr.diff().tolist(), targets.ptr.diff().tolist(), strict=True)
        examples = _one_by_one(one, list(sizes))
        first = sources.ptr[:-1]
    index = torch.cat([example.csr.index for example in examples])
    num_edges = torch.tensor([example.num_edges for example in examples], device=first.device)
    index = index + first.repeat_interleave(num_edges, output_size=index.numel())
    size = (sources.num_rows, targets.num_rows)
    fixed = {example.degree for example in examples if example.num_dst > 0}
    if len(fixed) == 1 and None not in fixed:
        return Relation.from_rows(index, fixed.pop() or 0, size, sources, targets)
    degree = torch.cat([example.csr.ptr.diff() for example in examples])
    return Relation.from_rows(index, degree.long(), size, sources, targets)


def _one_by_one(
    one: Callable[[int, int], Relation], sizes: list[tuple[int, int]]
) -> list[Relation]:
    relations = []
    for example, size in enumerate(sizes):
        try:
            relations.append(one(*size))
        except ValueError as error:
            more = sizes.count(size) - 1
            raise ValueError(
                f"{error} (example {example}{f' and {more} more' if more else ''})"
            ) from None
    return relations
