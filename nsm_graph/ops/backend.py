"""Which backend serves a call, and why: one table, visible to the user."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from nsm_graph.ops.segment import HAS_TORCH_SCATTER
from nsm_graph.relation import Relation

HAS_TRITON = find_spec("triton") is not None

NEEDS_TRITON = "needs Triton: pip install 'nsm-graph[gpu]'"

#: A ragged complete relation is padded if at least this share of the padded block holds edges.
MIN_DENSE_FILL = 0.5

#: The same for a causal relation, whose edges cost sparse kernels little where rows are short.
MIN_CAUSAL_FILL = 0.75

#: Ragged causal examples that hold at least so many edges on average (those of 128 nodes do) are
#: attended to one by one, without padding, rather than edge by edge.
MIN_CAUSAL_EDGES = 8192


class BackendChoice(NamedTuple):
    """A backend's name and the reason it was chosen."""

    name: str
    reason: str


def choose_backend(
    relation: Relation,
    dtype: torch.dtype,
    forced: str | None = None,
    *,
    normalise: str = "target",
    has_bias: bool = False,
) -> BackendChoice:
    """The first row of the table that fits; see :func:`explain`."""
    if forced is not None:
        _check_forced(forced, relation)
        return BackendChoice(forced, "forced by backend=")
    if dtype == torch.float64:
        return BackendChoice("reference", "float64 asks for exactness and second derivatives")
    if relation.is_causal:
        return _choose_causal(relation, normalise, has_bias)
    if not relation.is_complete:
        return _choose_sparse(relation, "general edges")
    if relation.is_uniform:
        return BackendChoice("dense", "complete and uniform: one dense block per example")
    # Texts are constant here: formatting a symbolic number would break a compiled caller.
    if relation.fill >= MIN_DENSE_FILL:
        return BackendChoice("dense", "complete and ragged, enough of the padding full")
    return _choose_sparse(relation, "complete and ragged, too little of the padding full")


def _choose_causal(relation: Relation, normalise: str, has_bias: bool) -> BackendChoice:
    """The dense kernel leaves out the half that no edge fills, but knows neither of these two."""
    if normalise == "source":
        return _choose_sparse(relation, "causal, grouped by source")
    if has_bias:
        return _choose_sparse(relation, "causal, with a bias")
    if relation.targets is not None and relation.targets.is_uniform:
        return BackendChoice("dense", "causal and uniform: one dense block per example")
    if relation.fill >= MIN_CAUSAL_FILL:
        return BackendChoice("dense", "causal and ragged, enough of the padding full")
    if is_one_by_one(relation):
        return BackendChoice("dense", "causal and ragged, long examples: one by one")
    return _choose_sparse(relation, "causal and ragged, too little of the padding full")


def is_one_by_one(relation: Relation) -> bool:
    """Whether the dense backend calls its kernel for each causal example instead of padding.

    A GPU never does: it would wait for one launch after the other. Nor does compiled code: it would
    hold one call per example, and be compiled again for each batch.
    """
    if relation.device.type != "cpu":
        return False
    if relation.fill >= MIN_CAUSAL_FILL or torch.compiler.is_compiling():
        return False
    return relation.num_edges >= MIN_CAUSAL_EDGES * relation.num_examples


def _choose_sparse(relation: Relation, reason: str) -> BackendChoice:
    """Kernels where the device has them."""
    device = relation.device.type
    if device == "cpu" or (device == "cuda" and HAS_TRITON):
        return BackendChoice("sparse", reason)
    lacks = NEEDS_TRITON if device == "cuda" else "no kernels for this device"
    return BackendChoice("reference", f"{reason}; {lacks}")


def explain(
    relation: Relation,
    dtype: torch.dtype = torch.float32,
    *,
    normalise: str = "target",
    has_bias: bool = False,
) -> BackendChoice:
    r"""Says which backend serves a relation, and why.

    Args:
        relation: The edges.
        dtype: Of query, key and value. (default: :obj:`torch.float32`)
        normalise: As for the operation. (default: :obj:`"target"`)
        has_bias: Whether the call brings a bias; that of the relation counts by itself.
            (default: :obj:`False`)

    Example:
        >>> explain(Relation.complete([0, 4, 8], [0, 2, 4])).name
        'dense'
    """
    has_bias = has_bias or relation.bias is not None
    name, reason = choose_backend(relation, dtype, normalise=normalise, has_bias=has_bias)
    if "and ragged" in reason:
        reason += f" ({relation.fill:.0%} full)"
    return BackendChoice(name, reason)


def available_backends() -> list[tuple[str, bool, str]]:
    """Name, availability and reason of every backend."""
    has_scatter = "torch-scatter is installed"
    if not HAS_TORCH_SCATTER:
        has_scatter = "needs torch-scatter: pip install --no-build-isolation torch-scatter"
    on_gpu = " and a GPU (Triton)" if HAS_TRITON else f"; a GPU {NEEDS_TRITON}"
    return [
        ("reference", True, "gather, softmax, scatter; any edges, any order of derivative"),
        ("dense", True, "scaled_dot_product_attention; complete and causal relations"),
        ("sparse", True, f"kernels, no messages per edge; any edges on a CPU (Numba){on_gpu}"),
        ("segment_csr", HAS_TORCH_SCATTER, f"{has_scatter}; only where forced"),
    ]


def _check_forced(name: str, relation: Relation) -> None:
    known = {backend: (is_available, why) for backend, is_available, why in available_backends()}
    if name not in known:
        raise ValueError(f"backend must be one of {sorted(known)} or None, but is {name!r}")
    is_available, why = known[name]
    if not is_available:
        raise ValueError(f"backend {name!r} is not available: {why}")
    if name == "sparse" and relation.device.type == "cuda" and not HAS_TRITON:
        raise ValueError(f'backend "sparse" on {relation.device} {NEEDS_TRITON}')
    if name == "dense" and not (relation.is_complete or relation.is_causal):
        raise ValueError(
            'backend "dense" needs a complete relation or a causal one, but this one holds general '
            'edges; use backend="reference" or None'
        )
