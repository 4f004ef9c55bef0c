r"""Lists of edges: checked, grouped by one of their ends, and laid out as a dense view.

What a :class:`~nsm_graph.Relation` makes when somebody asks for it. The functions here know
tensors only, and no relation.

Legend: M sources, N targets, E edges, B examples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.partition import Partition, holds_integers

_INT32_MAX = 2**31 - 1


class CompressedEdges(NamedTuple):
    """Edges grouped by one of their ends (CSR by target, CSC by source)."""

    ptr: Tensor  #: ``[groups + 1]``, int32 where it fits
    index: Tensor  # type: ignore[assignment]  #: ``[E]``, the other ends, int32 where it fits
    perm: Tensor  #: ``[E]``, which edge of the relation stands here, int64


# Grouped edges #####################################################################


def compress(group: Tensor, other: Tensor, num_groups: int, num_others: int) -> CompressedEdges:
    """Edges in any order, grouped by one end; those of a group keep their order."""
    perm = torch.argsort(group, stable=True)
    # Not bincount: a compiler cannot know how long its result is.
    counts = group.new_zeros(num_groups).index_add(0, group, torch.ones_like(group))
    ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _narrow(ptr, other[perm], perm, num_others)


def compress_rows(index: Tensor, degree: Tensor | int, size: tuple[int, int]) -> CompressedEdges:
    """Edges that stand by target already: nothing is sorted, and nothing looked at."""
    num_src, num_dst = size
    if isinstance(degree, int):
        ptr = torch.arange(num_dst + 1, device=index.device) * degree
    else:
        ptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    return _narrow(ptr, index, torch.arange(index.numel(), device=index.device), num_src)


def _narrow(ptr: Tensor, index: Tensor, perm: Tensor, num_others: int) -> CompressedEdges:
    if max(index.numel(), ptr.numel() - 1, num_others) <= _INT32_MAX:
        ptr, index = ptr.int(), index.int()
    return CompressedEdges(ptr, index, perm)


# Edges that are known without a list ###############################################


def list_first_sources(degree: Tensor, first_source: Tensor, num_edges: int) -> Tensor:
    """``[2, E]``: target j hears ``degree[j]`` sources from ``first_source[j]`` on; by target."""
    target = torch.repeat_interleave(degree, output_size=num_edges)
    # What the number of an edge is ahead of its source.
    ahead = degree.cumsum(0) - degree - first_source
    return torch.stack([torch.arange(num_edges, device=degree.device) - ahead[target], target])


def list_rows(csr: CompressedEdges) -> Tensor:
    """``[2, E]`` of edges that stand by target."""
    degree = csr.ptr.diff().long()
    target = torch.repeat_interleave(degree, output_size=csr.index.numel())
    return torch.stack([csr.index.long(), target])


# The dense view ####################################################################


def place_edges(
    edge_index: Tensor, num_src: int, sources: Partition | None, targets: Partition | None
) -> Tensor:
    """Place of each edge in the flattened view ``[B, targets, sources]``; one example if None."""
    src, dst = edge_index
    if sources is None or targets is None:
        return dst * num_src + src
    example = targets.batch[dst]
    row = dst - targets.ptr[example]
    column = src - sources.ptr[example]
    return (example * targets.max_count + row) * sources.max_count + column


def spread(values: Tensor, position: Tensor, shape: tuple[int, int, int], fill: float) -> Tensor:
    """Values ``[E, ...]`` in a dense view of that shape, ``fill`` elsewhere; duplicates add up."""
    flat = values.new_zeros(shape[0] * shape[1] * shape[2], *values.shape[1:])
    flat = flat.index_add(0, position, values)
    if fill != 0.0:
        holds_edge = torch.zeros(flat.size(0), dtype=torch.bool, device=flat.device)
        holds_edge[position] = True
        flat = flat.masked_fill(~holds_edge.view(-1, *[1] * (flat.dim() - 1)), fill)
    return flat.unflatten(0, shape)


# What is wrong with a list #########################################################


def check_rows(index: Tensor, degree: Tensor | int, num_dst: int) -> None:
    """Raises unless ``[E]`` sources are as many as the degrees of the targets say."""
    is_fixed = isinstance(degree, int)
    if index.dim() != 1 or (is_fixed and index.numel() != degree * num_dst):
        raise ValueError(
            f"index must hold {degree} sources for each of the {num_dst} targets, but has shape "
            f"{tuple(index.shape)}"
        )
    if isinstance(degree, int):
        return
    if degree.shape != (num_dst,):
        raise ValueError(
            f"degree must be one number for each of the {num_dst} targets, but has shape "
            f"{tuple(degree.shape)}"
        )
    # A wrong sum would read beyond the sources. Skipped where it would stop a GPU.
    if not degree.is_cuda and int(degree.sum()) != index.numel():
        raise ValueError(
            f"degree adds up to {int(degree.sum())} edges, but index has {index.numel()}"
        )


def check_edge_index(edge_index: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    """The size of PyG's ``edge_index`` ``[2, E]``, as given or as its indices ask; or raises."""
    is_empty = edge_index.size(1) == 0
    most = [-1, -1] if is_empty else edge_index.amax(dim=1).tolist()
    least = 0 if is_empty else int(edge_index.min())
    if least < 0:
        shown = show_edges(edge_index, (edge_index < 0).any(0))
        raise ValueError(
            f"edge_index holds the negative index {least}; indices start at 0 ({shown})"
        )
    size = (most[0] + 1, most[1] + 1) if size is None else (int(size[0]), int(size[1]))
    if min(size) < 0:
        raise ValueError(f"size must be (num_src, num_dst), but is {size}")
    for row, (name, index, rows) in enumerate(zip(("source", "target"), most, size, strict=True)):
        if index >= rows:
            shown = show_edges(edge_index, edge_index[row] >= rows)
            raise ValueError(
                f"edge_index names {name} {index}, but there are {rows} {name} nodes; {name}s "
                f"count from 0 ({shown})"
            )
    return size


def as_edge_index(edge_index: Tensor) -> Tensor:
    """PyG's ``edge_index`` as int64, or a ``ValueError`` about its shape or type."""
    if not isinstance(edge_index, Tensor) or edge_index.dim() != 2 or edge_index.size(0) != 2:
        got = tuple(edge_index.shape) if isinstance(edge_index, Tensor) else type(edge_index)
        raise ValueError(f"edge_index must be a tensor of shape (2, E), but got {got}")
    if not holds_integers(edge_index):
        raise ValueError(
            f"edge_index must hold integers, but has dtype {edge_index.dtype}; use .long()"
        )
    return edge_index.long()


def show_edges(edge_index: Tensor, is_wrong: Tensor) -> str:
    """The first few edges of which something is said, for an error: ``edge 3: 8 -> 0, ...``."""
    wrong = is_wrong.nonzero().flatten()
    shown = [
        f"edge {e}: {s} -> {t}"
        for e, s, t in zip(wrong[:3].tolist(), *edge_index[:, wrong[:3]].tolist(), strict=True)
    ]
    more = wrong.numel() - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
