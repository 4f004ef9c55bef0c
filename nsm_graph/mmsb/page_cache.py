"""What a stack keeps of a run, so that a later one need not compute it again."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from weakref import ref

import torch
from torch import Tensor, nn

from nsm_graph.mmsb.neighbourhood import Neighbourhood
from nsm_graph.mmsb.router import DeltaRouter
from nsm_graph.mmsb.shadow_graph import ShadowGraph
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation
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
    inputs: Inputs
    neighbourhoods: list[Neighbourhood]
    stamp: Stamp
    is_whole: bool = field(default=True)  #: False while, and after, an update was cut short
    #: Of what made the pages of tokens; None where the stack was given pages
    embedding: Stamp | None = None
    #: Whether all numbers are finite, ``[]``; None for not asked yet. A dense operation carries NaN
    #: along edges that are not there, so that a part would not equal the whole
    is_finite: Tensor | None = None

    @property
    def shadow_graph(self) -> ShadowGraph:
        return self.inputs.shadow_graph

    @property
    def attributes(self) -> dict[str, Tensor]:
        return self.inputs.attributes

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


#: What a stack, a pass, a router and a normalisation compute with, besides tensors. A stack's own
#: shadow graph is among its modules, or one of these.
_SETTINGS = ("activation", "norm_first", "eps", "heads", "_num_trainings")


class Stamp:
    """Tells whether a module changed: its parts, its settings, and the numbers in its tensors.

    Of a tensor it knows where it lies and how often it was written in place. Writes that torch does
    not count (``parameter.data``, fused optimizers) are not seen; a stack that was put in training
    mode since counts as changed, whatever was done there.

    What holds all that is looked up once. A stack walks through its modules for longer than a small
    pass takes.
    """

    def __init__(self, module: nn.Module, shadow_graph: ShadowGraph | None = None) -> None:
        self._module = ref(module)
        owners = list(module.modules())
        self._settings = [
            (vars(owner), name) for owner in owners for name in _SETTINGS if name in vars(owner)
        ]
        if isinstance(shadow_graph, Topology):
            owners += shadow_graph.modules()
        self._parts = [(owner._modules, dict(owner._modules)) for owner in owners]
        self._tensors = [names for owner in owners for names in (owner._parameters, owner._buffers)]
        #: Of projections whose weights updates read: their hooks would not be called.
        self._hooks = [
            hooks
            for owner in owners
            if isinstance(owner, DeltaRouter)
            for hooks in (owner.lin_qkv._forward_hooks, owner.lin_qkv._forward_pre_hooks)
        ]
        self._graph = vars(module).get("shadow_graph")
        self._seen = self._look()

    @property
    def has_hooks(self) -> bool:
        """Whether something is called in a run that updates leave out."""
        return any(self._hooks)

    def is_of(self, module: nn.Module) -> bool:
        """Whether it was made of this one."""
        return self._module() is module

    def _look(self) -> list[object]:
        seen: list[object] = [values.get(name) for values, name in self._settings]
        for names in self._tensors:
            for name, tensor in names.items():
                seen.append((name, None if tensor is None else written(tensor)))
        return seen

    def is_current(self) -> bool:
        """Whether all is as it was."""
        module = self._module()
        return (
            module is not None
            and vars(module).get("shadow_graph") is self._graph
            and all(now == then for now, then in self._parts)
            and self._look() == self._seen
        )


class Inputs:
    """The tensors that edges follow from besides the pages, as they were at a run or an update."""

    def __init__(self, shadow_graph: ShadowGraph, attributes: dict[str, Tensor] | None) -> None:
        self.shadow_graph, self.attributes = shadow_graph, dict(attributes or {})
        self._tensors = list(self.attributes.values())
        if isinstance(shadow_graph, Tensor):
            self._tensors.append(shadow_graph)
        elif isinstance(shadow_graph, Relation) and shadow_graph.bias is not None:
            self._tensors.append(shadow_graph.bias)
        self._seen = [written(tensor) for tensor in self._tensors]

    def is_written(self) -> bool:
        """Whether one was edited in place since: what it held before is lost."""
        return self._seen != [written(tensor) for tensor in self._tensors]

    def are_those_of(self, shadow_graph: ShadowGraph, attributes: dict[str, Tensor] | None) -> bool:
        """Whether these are the same objects."""
        mine, other = self.attributes, attributes or {}
        return (
            shadow_graph is self.shadow_graph
            and mine.keys() == other.keys()
            and all(mine[name] is other[name] for name in mine)
        )


def written(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies, and how often it was written in place, as far as torch counts."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
