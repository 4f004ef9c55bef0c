"""Which sources are the most alike to each target: k of them, or all that are alike enough.

States are by example, nothing is padded. Ties go to the lowest index. On a CPU in float32 a kernel
chooses the k (`cpu.py`); everything else takes the reference, which compares all pairs in full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.nearest import reference
from nsm_graph.ops.nearest.measures import MEASURES as MEASURES
from nsm_graph.ops.nearest.measures import Measure as Measure
from nsm_graph.partition import Partition


def nearest(
    targets: Tensor,
    sources: Tensor,
    k: int,
    measure: Measure,
    target_nodes: Partition,
    source_nodes: Partition,
    *,
    without_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The k most similar sources of every target in its example, ascending, ``[N, k]``.

    Args:
        targets: Prepared by the measure, ``[N, C]``.
        sources: The same, ``[M, C]``.
        k: At most as many as every example with targets has.
        measure: Compares them.
        target_nodes: How the targets fall into examples.
        source_nodes: How the sources do.
        without_self: Both are one set, and no node chooses itself.
        backend: ``"cpu"`` or ``"reference"``; ``None`` to choose.

    Example:
        >>> x, nodes = torch.tensor([[0.0], [1.0], [5.0]]), Partition.uniform(1, 3)
        >>> nearest(x, x, 1, MEASURES["euclidean"], nodes, nodes, without_self=True).flatten()
        tensor([1, 0, 1])
    """
    is_served = targets.device.type == "cpu" and targets.dtype == torch.float32
    if backend == "cpu" or (backend is None and is_served):
        from nsm_graph.ops.nearest import cpu

        return cpu.nearest(targets, sources, k, measure, target_nodes, source_nodes, without_self)
    arguments = (targets, sources, k, measure, target_nodes, source_nodes, without_self)
    return reference.nearest(*arguments)


def alike(
    targets: Tensor,
    sources: Tensor,
    least: float,
    measure: Measure,
    target_nodes: Partition,
    source_nodes: Partition,
    *,
    without_self: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""All pairs in an example whose similarity is at least so much: targets and sources, ``[E]``.

    By target, then by source. Arguments as of :func:`nearest`.

    Example:
        >>> x, nodes = torch.tensor([[0.0], [1.0], [5.0]]), Partition.uniform(1, 3)
        >>> alike(x, x, -4.0, MEASURES["euclidean"], nodes, nodes, without_self=True)
        (tensor([0, 1]), tensor([1, 0]))
    """
    arguments = (targets, sources, least, measure, target_nodes, source_nodes, without_self)
    return reference.alike(*arguments)
