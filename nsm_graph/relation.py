r"""Edge sets that know their structure.

A :class:`Relation` is one set of edges from a source node set to a target node set. Layers and
operations ask it what it knows (complete per example, causal, grouped by target, or general)
instead of finding out again. Lists of its edges are made when somebody asks: `edge_lists.py`.

Legend: M sources, N targets, E edges, B examples; a ``ptr`` of size B + 1 says which rows belong to
which example, as in PyG.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy

import torch
from torch import Tensor

from nsm_graph.edge_lists import (
    CompressedEdges,
    as_edge_index,
    check_edge_index,
    check_rows,
    compress,
    compress_rows,
    list_first_sources,
    list_rows,
    place_edges,
    spread,
)
from nsm_graph.partition import Partition, check_ptr, ptr_from_batch


class Relation:
    r"""One set of edges from M source nodes to N target nodes.

    Build it with :meth:`complete`, :meth:`causal`, :meth:`from_batch`, :meth:`from_rows` or
    :meth:`from_edge_index`. The order of the edges is fixed: as given for a general relation; for
    a complete or causal one by example, then by target, then by source. Per-edge values (attention
    weights, biases) always stand in this order.

    A relation may carry a ``bias``, which attention over it adds to its scores; see
    :meth:`with_bias`.

    Example:
        >>> relation = Relation.complete([0, 3, 5], [0, 2, 4])   # 3 and 2 tokens, 2 states each
        >>> relation
        Relation(5 -> 4, 10 edges, complete over 2 examples)
        >>> relation.edge_index[:, :3]
        tensor([[0, 1, 2],
                [0, 0, 0]])
    """

    def __init__(
        self,
        edge_index: Tensor | None,
        size: tuple[int, int],
        sources: Partition | None = None,
        targets: Partition | None = None,
        num_edges: int | None = None,
        *,
        csr: CompressedEdges | None = None,
        degree: int | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> None:
        # Internal: no checks. The class methods below are the checked constructors.
        self._edge_index = edge_index
        self.num_src, self.num_dst = size
        self.sources = sources
        self.targets = targets
        #: Whether target i of each example hears exactly its sources 0..i; no edges are stored.
        self.is_causal = is_causal
        #: Whether every target hears all sources of its example; no edges are stored.
        self.is_complete = edge_index is None and csr is None and not is_causal
        if csr is not None:
            num_edges = csr.index.numel()
        self.num_edges = (num_edges or 0) if edge_index is None else edge_index.size(1)
        #: Edges of every target, where all are known to have as many.
        self.degree = degree
        #: ``[E, 1 or H]``, added to the scores of whatever attends over these edges.
        self.bias = bias
        self._csr = csr
        self._csc: CompressedEdges | None = None
        self._positions: Tensor | None = None

    # Constructors ###############################################################

    @classmethod
    def complete(cls, src_ptr: Tensor | list[int], dst_ptr: Tensor | list[int]) -> Relation:
        r"""Every source of an example to every target of the same example; stores no edges.

        Args:
            src_ptr: ``[B + 1]``; the sources of example b are rows ``src_ptr[b]:src_ptr[b + 1]``.
            dst_ptr: ``[B + 1]``; the same for the targets.

        Raises:
            ValueError: If a pointer is not a non-decreasing integer vector that starts at 0, or
                the two disagree on the number of examples or the device.
        """
        src_ptr = check_ptr(src_ptr, "src_ptr")
        dst_ptr = src_ptr if dst_ptr is src_ptr else check_ptr(dst_ptr, "dst_ptr")
        if src_ptr.numel() != dst_ptr.numel():
            raise ValueError(
                f"src_ptr has {src_ptr.numel() - 1} examples, but dst_ptr has "
                f"{dst_ptr.numel() - 1}; build both from the same batch"
            )
        if src_ptr.device != dst_ptr.device:
            raise ValueError(
                f"src_ptr is on {src_ptr.device}, but dst_ptr is on {dst_ptr.device}; move one"
            )
        sources = Partition.from_ptr(src_ptr)
        targets = sources if dst_ptr is src_ptr else Partition.from_ptr(dst_ptr)
        return cls.between(sources, targets)

    @classmethod
    def causal(cls, ptr: Tensor | list[int]) -> Relation:
        r"""Node i of an example from its nodes 0 to i, itself included; stores no edges.

        Args:
            ptr: ``[B + 1]``; the nodes of example b are rows ``ptr[b]:ptr[b + 1]``.

        Raises:
            ValueError: If the pointer is not a non-decreasing integer vector that starts at 0.

        Example:
            >>> relation = Relation.causal([0, 3, 5])
            >>> relation
            Relation(5 -> 5, 9 edges, causal over 2 examples)
            >>> relation.edge_index
            tensor([[0, 0, 1, 0, 1, 2, 3, 3, 4],
                    [0, 1, 1, 2, 2, 2, 3, 4, 4]])
        """
        nodes = Partition.from_ptr(check_ptr(ptr, "ptr"))
        return cls.causal_between(nodes, nodes)

    @classmethod
    def causal_between(cls, sources: Partition, targets: Partition) -> Relation:
        """Target i of an example from its sources 0 to i, of which there are as many as targets.

        Raises:
            ValueError: If an example has more of the ones than of the others.
        """
        if not sources.has_counts_of(targets):
            raise ValueError(
                f"a causal relation needs as many sources as targets in every example, but has "
                f"{sources.num_rows} and {targets.num_rows} rows in {sources.num_examples} and "
                f"{targets.num_examples} examples that differ; use topology.causal()"
            )
        if targets.is_uniform:
            num_edges = targets.num_rows * (targets.max_count + 1) // 2
        else:
            counts = targets.ptr.diff()
            num_edges = int((counts * (counts + 1)).sum()) // 2
        size = (sources.num_rows, targets.num_rows)
        return cls(None, size, sources, targets, num_edges, is_causal=True)

    @classmethod
    def between(cls, sources: Partition, targets: Partition) -> Relation:
        """The complete relation between two partitions that are already known."""
        if sources.num_examples != targets.num_examples:
            raise ValueError(
                f"sources have {sources.num_examples} examples, but targets have "
                f"{targets.num_examples}; build both from the same batch"
            )
        # One uniform side suffices to count without reading anything back from the device.
        if targets.is_uniform:
            num_edges = sources.num_rows * targets.max_count
        elif sources.is_uniform:
            num_edges = targets.num_rows * sources.max_count
        else:
            num_edges = int((sources.ptr.diff() * targets.ptr.diff()).sum())
        return cls(None, (sources.num_rows, targets.num_rows), sources, targets, num_edges)

    @classmethod
    def from_rows(
        cls,
        index: Tensor,
        degree: Tensor | int,
        size: tuple[int, int],
        sources: Partition | None = None,
        targets: Partition | None = None,
    ) -> Relation:
        r"""A relation whose edges already stand by target: nothing is sorted, no list is built.

        Args:
            index: Sources of the first target, then of the second, and so on, ``[E]``. Not looked
                at: they must lie in ``0..num_src - 1``.
            degree: How many of them each target has, ``[N]``, or one number for all.
            size: ``(num_src, num_dst)``.
            sources: How the sources fall into examples, where the edges stay inside them.
            targets: The same for the targets.

        Raises:
            ValueError: If there are more or fewer sources than the degrees say.

        Example:
            >>> Relation.from_rows(torch.tensor([1, 2, 0, 2, 0, 1]), 2, (3, 3)).edge_index
            tensor([[1, 2, 0, 2, 0, 1],
                    [0, 0, 1, 1, 2, 2]])
        """
        check_rows(index, degree, size[1])
        csr = compress_rows(index, degree, size)
        fixed = degree if isinstance(degree, int) else None
        return cls(None, size, sources, targets, csr=csr, degree=fixed)

    @classmethod
    def from_batch(
        cls, src_batch: Tensor, dst_batch: Tensor, batch_size: int | None = None
    ) -> Relation:
        r"""The complete relation of two sorted PyG ``batch`` vectors."""
        if batch_size is None:
            ends = [int(b.flatten()[-1]) + 1 for b in (src_batch, dst_batch) if b.numel() > 0]
            batch_size = max([0, *ends])
        src_ptr = ptr_from_batch(src_batch, batch_size, "src_batch")
        dst_ptr = ptr_from_batch(dst_batch, batch_size, "dst_batch")
        return cls.complete(src_ptr, dst_ptr)

    @classmethod
    def from_edge_index(cls, edge_index: Tensor, size: tuple[int, int] | None = None) -> Relation:
        r"""A general relation from PyG's ``edge_index`` (sources above targets).

        Args:
            edge_index: ``[2, E]`` of an integer type. Duplicate edges stay, and count twice.
            size: ``(num_src, num_dst)``; ``None`` to take the largest index of each row.

        Raises:
            ValueError: If shape, type or an index is wrong.
        """
        edge_index = as_edge_index(edge_index)
        # Checks that read values happen in eager mode only.
        if size is None or not torch.compiler.is_compiling():
            size = check_edge_index(edge_index, size)
        return cls(edge_index, size)

    # What it knows ##############################################################

    @property
    def size(self) -> tuple[int, int]:
        """``(num_src, num_dst)``, as PyG's ``size``."""
        return self.num_src, self.num_dst

    @property
    def device(self) -> torch.device:
        if self._edge_index is not None:
            return self._edge_index.device
        if self._csr is not None:
            return self._csr.ptr.device
        assert self.sources is not None
        return self.sources.ptr.device

    @property
    def num_examples(self) -> int:
        """Examples of a complete or causal relation; a general one may count as one example."""
        return 1 if self.sources is None else self.sources.num_examples

    @property
    def is_uniform(self) -> bool:
        """Complete, with equally many sources and equally many targets in every example."""
        return (
            self.is_complete
            and self.sources is not None
            and self.targets is not None
            and self.sources.is_uniform
            and self.targets.is_uniform
        )

    @property
    def fill(self) -> float:
        """Share of the padded dense view that holds edges; 1 where all examples are alike.

        Of a causal relation's view, what lies after the target does not count: it is no padding.
        """
        num_examples, rows, columns = self._dense_shape
        dense = num_examples * rows * columns
        if self.is_causal:
            dense = num_examples * rows * (rows + 1) // 2
        return self.num_edges / dense if dense > 0 else 1.0

    # Made when first asked for. Not functools.cached_property: its lock breaks a compiled graph.

    @property
    def edge_index(self) -> Tensor:
        """``[2, E]``, int64, in the relation's own order."""
        if self._edge_index is None:
            with lasting():
                self._edge_index = self._list_edges()
        return self._edge_index

    def _list_edges(self) -> Tensor:
        if self._csr is not None:
            return list_rows(self._csr)
        assert self.sources is not None
        assert self.targets is not None
        first = self.sources.ptr[self.targets.batch]
        return list_first_sources(self.in_degree, first, self.num_edges)

    @property
    def csr(self) -> CompressedEdges:
        """Edges grouped by target; ``index`` holds their sources."""
        if self._csr is None:
            src, dst = self.edge_index
            with lasting():
                if self.is_complete or self.is_causal:  # stands by target already
                    self._csr = compress_rows(src, self.in_degree, self.size)
                else:
                    self._csr = compress(dst, src, self.num_dst, self.num_src)
        return self._csr

    @property
    def csc(self) -> CompressedEdges:
        """Edges grouped by source; ``index`` holds their targets."""
        if self._csc is None:
            src, dst = self.edge_index
            with lasting():
                self._csc = compress(src, dst, self.num_src, self.num_dst)
        return self._csc

    @property
    def in_degree(self) -> Tensor:
        """``[N]``, how many edges enter each target."""
        if self.is_causal and self.targets is not None:
            return self.targets.place + 1
        if self.is_complete and self.sources is not None and self.targets is not None:
            return self.sources.ptr.diff()[self.targets.batch]
        if self._csr is not None:
            return self._csr.ptr.diff().long()
        dst = self.edge_index[1]
        return dst.new_zeros(self.num_dst).index_add(0, dst, torch.ones_like(dst))

    @property
    def has_in_edge(self) -> Tensor:
        """``[N]``, true for targets that at least one edge enters."""
        return self.in_degree > 0

    @property
    def reaches_every_target(self) -> bool:
        """Whether an edge is known to enter every target, without looking at the edges."""
        if self.is_causal:
            return True
        if self.degree is not None:
            return self.degree > 0
        return self.is_complete and self.sources is not None and self.sources.min_count > 0

    @property
    def version(self) -> int:
        """Counts writes, in place, to what it holds. Lists that it makes by itself start at 0."""
        ends = [nodes for nodes in (self.sources, self.targets) if nodes is not None]
        held = [self._edge_index, self._positions, self.bias]
        held += [*(self._csr or ()), *(self._csc or ())]
        held += [tensor for nodes in ends for tensor in (nodes.ptr, nodes.position)]
        return sum(
            tensor._version for tensor in held if tensor is not None and not tensor.is_inference()
        )

    # Changes ####################################################################

    def with_bias(self, bias: Tensor) -> Relation:
        r"""The same edges, with numbers that attention over them adds to its scores.

        Args:
            bias: One number per edge, or one per edge and head: ``[E]`` or ``[E, H]``, in the
                relation's edge order. :math:`-\infty` removes an edge. What the relation carried
                before is added.

        Raises:
            ValueError: If there is not one row per edge.

        Example:
            >>> relation = Relation.complete([0, 2], [0, 1]).with_bias(torch.tensor([0.0, -1.0]))
            >>> relation.bias
            tensor([[ 0.],
                    [-1.]])
        """
        if bias.dim() not in (1, 2) or bias.size(0) != self.num_edges:
            raise ValueError(
                f"bias must have shape ({self.num_edges},) or ({self.num_edges}, heads), one row "
                f"per edge, but has {tuple(bias.shape)}"
            )
        bias = bias.unsqueeze(1) if bias.dim() == 1 else bias
        return self._changed(bias=bias if self.bias is None else self.bias + bias)

    def _changed(self, **what: object) -> Relation:
        """A copy that shares what was made for these edges already."""
        relation = copy(self)
        for name, value in what.items():
            setattr(relation, name, value)
        return relation

    def reverse(self) -> Relation:
        """The same edges from targets to sources, with the bias they carry.

        A general or causal relation keeps its edge order, and is general then; a complete one has
        the complete order again.
        """
        size = (self.num_dst, self.num_src)
        if self.is_complete and self.bias is None:
            return Relation(None, size, self.targets, self.sources, self.num_edges)
        edges = self.edge_index.flip(0)
        relation = Relation(edges, size, self.targets, self.sources, bias=self.bias)
        relation._csr, relation._csc = self._csc, self._csr
        return relation

    def subset(self, edges: Tensor) -> Relation:
        """A general relation of some of the edges, named by their numbers; examples are kept."""
        bias = None if self.bias is None else self.bias[edges]
        edge_index = self.edge_index[:, edges]
        return Relation(edge_index, self.size, self.sources, self.targets, bias=bias)

    def to(self, device: torch.device | str) -> Relation:
        """The relation on another device."""
        sources = None if self.sources is None else self.sources.to(device)
        if self.targets is self.sources:
            targets = sources
        else:
            targets = None if self.targets is None else self.targets.to(device)
        return self._changed(
            sources=sources,
            targets=targets,
            bias=None if self.bias is None else self.bias.to(device),
            _edge_index=None if self._edge_index is None else self._edge_index.to(device),
            _csr=None if self._csr is None else CompressedEdges(*(x.to(device) for x in self._csr)),
            _csc=None,
            _positions=None,
        )

    def to_dense(self, values: Tensor, fill: float = 0.0) -> Tensor:
        r"""Per-edge values ``[E, ...]`` as ``[B, targets, sources, ...]``, ``fill`` elsewhere.

        Values of duplicate edges add up. The documented layouts follow by a permutation: routing
        weights ``[batch, segment, states]`` are ``to_dense(w).transpose(1, 2)``, attention weights
        ``[batch, heads, states, segment]`` are ``to_dense(alpha).permute(0, 3, 1, 2)``.
        """
        if values.size(0) != self.num_edges:
            raise ValueError(
                f"the relation has {self.num_edges} edges, but values has {values.size(0)} rows"
            )
        shape = self._dense_shape
        if self.is_uniform:
            return values.reshape(*shape, *values.shape[1:])
        return spread(values, self._dense_position, shape, fill)

    def from_dense(self, dense: Tensor) -> Tensor:
        """``[B, targets, sources, ...]`` -> per-edge values ``[E, ...]``."""
        if dense.shape[:3] != self._dense_shape:
            raise ValueError(
                f"the dense view of the relation has shape {self._dense_shape}, but dense has "
                f"{tuple(dense.shape)}"
            )
        flat = dense.flatten(0, 2)
        return flat if self.is_uniform else flat.index_select(0, self._dense_position)

    @property
    def _dense_shape(self) -> tuple[int, int, int]:
        if self.sources is None or self.targets is None:
            return 1, self.num_dst, self.num_src
        return self.num_examples, self.targets.max_count, self.sources.max_count

    @property
    def _dense_position(self) -> Tensor:
        """Place of each edge in the flattened dense view."""
        if self._positions is None:
            ends = self.num_src, self.sources, self.targets
            with lasting():
                self._positions = place_edges(self.edge_index, *ends)
        return self._positions

    def __repr__(self) -> str:
        kind = "general"
        if self.is_complete or self.is_causal:
            structure = "complete" if self.is_complete else "causal"
            kind = f"{structure} over {self.num_examples} examples"
        if self.degree is not None:
            kind = f"{self.degree} a target"
        return f"Relation({self.num_src} -> {self.num_dst}, {self.num_edges} edges, {kind})"


def lasting() -> AbstractContextManager:
    """Where to make what is remembered: evaluation may ask first, and training uses it, too.

    Tensors made inside :func:`torch.inference_mode` cannot be saved for a backward pass.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def as_relation(edges: Tensor | Relation, size: tuple[int, int]) -> Relation:
    """A relation of the given size from what a layer was handed, or a ``ValueError``."""
    if not isinstance(edges, Relation):
        return Relation.from_edge_index(edges, size)
    check_size(edges, size)
    return edges


def check_size(relation: Relation, size: tuple[int, int]) -> None:
    """Raises if the relation's node counts and those of the features disagree."""
    for side, rows, given in zip(("from", "to"), relation.size, size, strict=True):
        if rows != given:
            raise ValueError(
                f"relation goes {side} {rows} nodes, but their features have {given} rows; "
                f"build both from the same batch"
            )
