"""The hot operation: softmax over grouped edges, weighted sum into targets.

One signature, several backends, one reference. This file checks the arguments and chooses the
backend; `README.md` beside it holds the derivation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from nsm_graph.ops.backend import BackendChoice, choose_backend
from nsm_graph.ops.edge_attention import dense, reference, segment_csr, sparse
from nsm_graph.relation import Relation, check_size

Normalise = Literal["target", "source"]

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.edge_attention,
    "segment_csr": segment_csr.edge_attention,
    "dense": dense.edge_attention,
    "sparse": sparse.edge_attention,
}


def edge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relation: Relation,
    *,
    bias: Tensor | None = None,
    normalise: Normalise = "target",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax over the edges that share a node, weighted sum of values into the targets.

    .. math::
        a_{e,h} = \mathrm{softmax}_{e' \in G(e)}\big(q_{j,h} \cdot k_{i,h} \, / \sqrt{D}
        + b_{e,h}\big), \qquad
        o_{j,h} = \sum_{e: i \to j} a_{e,h} \, v_{i,h}

    :math:`G(e)` holds the edges that enter the same target (``normalise="target"``: attention) or
    that leave the same source (``normalise="source"``: routing). A group without edges, or in
    which every bias is :math:`-\infty`, contributes zeros. Duplicate edges count twice.

    Args:
        query: One row per target.
        key: One row per source.
        value: One row per source.
        relation: The edges, from sources to targets.
        bias: Added to the scores, in the relation's edge order, and to what the relation carries;
            :math:`-\infty` removes an edge. (default: :obj:`None`)
        normalise: Which end of the edges forms the groups. (default: :obj:`"target"`)
        scale: Factor of the dot products; ``None`` for :math:`1 / \sqrt{D}`.
            (default: :obj:`None`)
        backend: Name of the backend to force; ``None`` to let :func:`nsm_graph.ops.explain`
            choose. (default: :obj:`None`)

    Shapes:
        - **input:** query :math:`(N, H, D)`, key and value :math:`(M, H, D)`, bias
          :math:`(E,)`, :math:`(E, 1)` or :math:`(E, H)`
        - **output:** :math:`(N, H, D)`

    Raises:
        ValueError: If shapes, dtypes, devices or the relation's sizes disagree, ``normalise`` is
            unknown, or the backend is unknown or cannot serve this call.

    Example:
        >>> import torch
        >>> relation = Relation.complete([0, 3], [0, 2])
        >>> q, k = torch.randn(2, 4, 8), torch.randn(3, 4, 8)
        >>> edge_attention(q, k, k, relation).shape
        torch.Size([2, 4, 8])
    """
    bias = _check_arguments(query, key, value, relation, bias, normalise)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    choice = choose_backend(
        relation, query.dtype, backend, normalise=normalise, has_bias=bias is not None
    )
    return BACKENDS[choice.name](
        query, key, value, relation, bias_EH=bias, normalise=normalise, scale=scale
    )


def edge_attention_weights(
    query: Tensor,
    key: Tensor,
    relation: Relation,
    *,
    bias: Tensor | None = None,
    normalise: Normalise = "target",
    scale: float | None = None,
) -> Tensor:
    r"""The weights :math:`a_{e,h}` of :func:`edge_attention` in edge order, ``(E, H)``.

    For looking at: it materialises one number per edge and head.
    """
    bias = _check_arguments(query, key, key, relation, bias, normalise)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return reference.edge_attention_weights(
        query, key, relation, bias_EH=bias, normalise=normalise, scale=scale
    )


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relation: Relation,
    bias: Tensor | None,
    normalise: str,
) -> Tensor | None:
    """Checks everything that can be checked without reading values; returns the bias ``[E, H]``."""
    if normalise not in ("target", "source"):
        raise ValueError(f'normalise must be "target" or "source", but is {normalise!r}')
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have shape (nodes, heads, channels), but has {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but query has {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")
    if not query.is_floating_point():
        raise ValueError(f"query, key and value must be floating point, but are {query.dtype}")
    if query.size(2) == 0:
        raise ValueError(
            f"query {tuple(query.shape)} has no channels; it needs at least one a head"
        )
    if key.shape[1:] != query.shape[1:] or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            f"must agree in heads, query and key in channels, key and value in rows"
        )
    if value.size(2) != query.size(2):
        raise ValueError(
            f"value has {value.size(2)} channels a head, but query has {query.size(2)}; they must "
            f"be equal"
        )
    check_size(relation, (key.size(0), query.size(0)))
    if relation.device != query.device:
        raise ValueError(
            f"relation is on {relation.device}, but query is on {query.device}; use relation.to()"
        )
    return joined_bias(bias, relation, query)


def joined_bias(bias: Tensor | None, relation: Relation, query: Tensor) -> Tensor | None:
    """What a caller and the relation add to the scores together, ``[E, 1 or H]``."""
    given = [term for term in (bias, relation.bias) if term is not None]
    terms = [check_bias(term, relation.num_edges, query) for term in given]
    if len(terms) < 2:
        return terms[0] if terms else None
    return terms[0] + terms[1]


def check_bias(bias: Tensor, num_edges: int, query: Tensor) -> Tensor:
    """The bias as ``[E, 1 or H]`` in the dtype of the query ``[N, H, D]``, or a ``ValueError``."""
    if not bias.is_floating_point() or bias.device != query.device:
        raise ValueError(
            f"bias must be floating point on {query.device}, but is {bias.dtype} on {bias.device}; "
            f"0 keeps an edge and -inf removes it"
        )
    heads = query.size(1)
    if bias.shape not in ((num_edges,), (num_edges, 1), (num_edges, heads)):
        raise ValueError(
            f"bias must have shape ({num_edges},), ({num_edges}, 1) or ({num_edges}, {heads}), but "
            f"has {tuple(bias.shape)}"
        )
    return bias.to(query.dtype).view(num_edges, -1 if num_edges > 0 else heads)


__all__ = ["BACKENDS", "BackendChoice", "edge_attention", "edge_attention_weights"]
