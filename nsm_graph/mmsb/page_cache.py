"""What a stack keeps of a run, so that a later one need not compute it again."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from weakref import ref

import torch
from torch import Tensor, nn

from nsm_graph.mmsb.neighbourhood import Neighbourhood
from nsm_graph.mmsb.shadow_graph import ShadowGraph
from nsm_graph.partition import Partition
from nsm_graph.topology import Topology


class PageBuffers:
    """Rows of pages, keys and values with spare room behind them: one more row copies nothing.

    All have as many rows. When the room is full it doubles, so that a stream copies each row a
    constant number of times.

    Args:
        num_passes: Number of passes, L.
        heads: Number of heads.
        has_final: Whether there are pages after a final norm as well.
        is_by_head: Whether keys and values lie head by head. Attention over a block of pages then
            reads one stretch of memory for each head, which is several times faster for a single
            query; edge by edge it would copy all of them first.
        pages: What the rows are like, and how many there are.
    """

    def __init__(
        self, num_passes: int, heads: int, has_final: bool, is_by_head: bool, pages: Tensor
    ) -> None:
        self.num_passes, self.count, self.is_by_head = num_passes, pages.size(0), is_by_head
        self._widths = (pages.size(1), heads, pages.size(1) // heads)
        self._pages, self._sources = self._make(pages, num_passes + 1 + has_final, self.count)
        self._look()

    def _make(self, like: Tensor, num_pages: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Pages ``[buffers, capacity, C]``, keys and values ``[2 L, capacity, H, D]``."""
        channels, heads, width = self._widths
        pages = _empty(like, num_pages, capacity, channels)
        if self.is_by_head:
            sources = _empty(like, 2 * self.num_passes, heads, capacity, width)
            return pages, sources.transpose(1, 2)
        return pages, _empty(like, 2 * self.num_passes, capacity, heads, width)

    def _look(self) -> None:
        """Views of the rows in use; indexing anew for every pass would cost as much as the pass."""
        pages = self._pages[:, : self.count].unbind(0)
        sources = self._sources[:, : self.count].unbind(0)
        self.snapshots = pages[: self.num_passes + 1]  #: P_0 ... P_L, ``[P, C]``
        self.final = pages[-1]  #: after the final norm; without one, P_L
        self.keys = sources[: self.num_passes]  #: ``[P, H, D]``
        self.values = sources[self.num_passes :]

    def extend(self, num_rows: int) -> None:
        """Room for so many rows behind the last; what stands in them is undefined."""
        count, capacity = self.count + num_rows, self._pages.size(1)
        if count > capacity:
            pages, sources = self._make(self._pages, self._pages.size(0), max(count, 2 * capacity))
            pages[:, : self.count] = self._pages[:, : self.count]
            sources[:, : self.count] = self._sources[:, : self.count]
            self._pages, self._sources = pages, sources
        self.count = count
        self._look()

    def reorder(self, new_to_old: Tensor) -> None:
        """Other rows in another order; those that come from nowhere (-1) are undefined."""
        count, rows = new_to_old.numel(), new_to_old.clamp(min=0)
        pages, sources = self._make(self._pages, self._pages.size(0), count)
        pages.copy_(self._pages.index_select(1, rows))
        sources.copy_(self._sources.index_select(1, rows))
        self._pages, self._sources, self.count = pages, sources, count
        self._look()

    def clone(self) -> PageBuffers:
        """The same rows in memory of their own."""
        other = copy(self)
        other._pages, other._sources = self._pages.clone(), self._sources.clone()
        other._look()
        return other

    @property
    def num_bytes(self) -> int:
        """Spare room included."""
        num_numbers = self._pages.numel() + self._sources.numel()
        return num_numbers * self._pages.element_size()


def _empty(like: Tensor, *sizes: int) -> Tensor:
    # Buffers made inside inference_mode could not be written outside it.
    with torch.inference_mode(False):
        return torch.empty(*sizes, dtype=like.dtype, device=like.device)


@dataclass(eq=False)
class PropagationCache:
    r"""The state of a stack: pages of every snapshot, keys and values of every pass.

    Made by ``stack.run(pages, cache=True)``, read and written by ``stack.update`` and
    ``stack.append``. It takes :math:`(3L + 1) C` numbers for each page (:math:`C` more with a final
    norm), at most twice that with the spare room of a stream, and what tells the edges: nothing for
    ``complete()``, ``causal()``, ``window()`` and ``band()``, else the relation.
    """

    buffers: PageBuffers
    examples: Partition
    shadow_graph: ShadowGraph
    attributes: dict[str, Tensor] | None
    neighbourhoods: list[Neighbourhood]
    stamp: Stamp
    is_whole: bool = field(default=True)  #: False while, and after, an update was cut short

    @property
    def num_pages(self) -> int:
        return self.buffers.count

    @property
    def pages(self) -> Tensor:
        """The final state ``[P, C]``: a view that the next update overwrites."""
        return self.buffers.final

    @property
    def snapshots(self) -> tuple[Tensor, ...]:
        """P_0 ... P_L, ``[P, C]`` each: views that the next update overwrites."""
        return tuple(self.buffers.snapshots)

    def clone(self) -> PropagationCache:
        """A cache of its own that goes on from here: a stream that branches."""
        return replace(self, buffers=self.buffers.clone(), neighbourhoods=list(self.neighbourhoods))

    @property
    def num_bytes(self) -> int:
        """Memory of pages, keys and values, spare room included."""
        return self.buffers.num_bytes

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_pages} pages, {self.buffers.num_passes} passes, "
            f"{self.num_bytes / 2**20:.1f} MiB)"
        )


class Stamp:
    """Tells whether weights changed: where each lies, and how often it was written in place.

    What holds them is looked up once. A stack walks through its modules for longer than a small
    pass takes.
    """

    def __init__(self, stack: nn.Module, shadow_graph: ShadowGraph) -> None:
        self._stack = ref(stack)
        roots = [stack, shadow_graph] if isinstance(shadow_graph, Topology) else [stack]
        self._modules = [
            (names, name, module)
            for root in roots
            for owner in root.modules()
            for names in (owner._modules,)
            for name, module in names.items()
        ]
        self._tensors = [
            (names, name)
            for root in roots
            for owner in root.modules()
            for names in (owner._parameters, owner._buffers)
            for name, tensor in names.items()
            if tensor is not None
        ]
        self._seen = self._look()

    def is_of(self, stack: nn.Module) -> bool:
        """Whether it was made of this stack."""
        return self._stack() is stack

    def _look(self) -> list[tuple[int, int]]:
        tensors = (names[name] for names, name in self._tensors)
        return [
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensor in tensors
        ]

    def is_current(self) -> bool:
        """Whether all is as it was."""
        return (
            all(names.get(name) is module for names, name, module in self._modules)
            and self._look() == self._seen
        )
