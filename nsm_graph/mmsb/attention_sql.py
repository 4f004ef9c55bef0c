"""Attention as one SQL statement: what the kernels compute, said declaratively and executed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.edge_attention import Normalise
from nsm_graph.relation import Relation, as_relation
from nsm_graph.topology.sql import connect

_STATEMENT = """\
WITH scores AS (
    SELECT e.edge, e.src, e.dst, e.head, sum(q.value * k.value) / sqrt(count(*)) + e.bias AS score
    FROM edges e
    JOIN queries q ON q.page = e.dst AND q.head = e.head
    JOIN keys k ON k.page = e.src AND k.head = e.head AND k.channel = q.channel
    WHERE e.bias > '-infinity'
    GROUP BY e.edge, e.src, e.dst, e.head, e.bias
),
maxima AS (
    SELECT {end}, head, max(score) AS highest FROM scores GROUP BY {end}, head
),
weights AS (
    SELECT src, dst, head, exp(score - highest) AS weight
    FROM scores JOIN maxima USING ({end}, head)
),
totals AS (
    SELECT {end}, head, sum(weight) AS total FROM weights GROUP BY {end}, head
),
heard AS (
    SELECT w.dst AS page, w.head, v.channel, sum(w.weight / t.total * v.value) AS value
    FROM weights w
    JOIN totals t ON t.{end} = w.{end} AND t.head = w.head
    JOIN "values" v ON v.page = w.src AND v.head = w.head
    GROUP BY w.dst, w.head, v.channel
)
SELECT page, head, channel, coalesce(heard.value, 0) AS value
FROM pages LEFT JOIN heard USING (page, head, channel)
ORDER BY page, head, channel
"""


def attention_statement(normalise: Normalise = "target") -> str:
    r"""The statement that :func:`attention_sql` runs.

    It reads the tables

    - ``edges(edge, src, dst, head, bias)``: a row for each edge and head,
    - ``queries``, ``keys``, ``"values"``, each ``(page, head, channel, value)``,
    - ``pages(page, head, channel)``: what is asked for; zero where no edge enters.

    ``count(*)`` is the number of channels, over which a score is summed.

    Args:
        normalise: ``"target"`` for a softmax over the edges that enter a page, ``"source"`` for
            one over those that leave it. (default: :obj:`"target"`)

    Raises:
        ValueError: If ``normalise`` is neither.
    """
    ends = {"target": "dst", "source": "src"}
    if normalise not in ends:
        raise ValueError(f'normalise must be "target" or "source", but is {normalise!r}')
    return _STATEMENT.format(end=ends[normalise])


def attention_sql(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relation: Relation | Tensor,
    *,
    bias: Tensor | None = None,
    normalise: Normalise = "target",
) -> Tensor:
    r"""Edge attention, computed by a database: the oracle of :func:`nsm_graph.ops.edge_attention`.

    .. math::
        o_{j,h} = \sum_{e: i \to j} \mathrm{softmax}_{e' \in G(e)}\big(q_{j,h} \cdot k_{i,h}
        / \sqrt{D} + b_{e,h}\big) \, v_{i,h}

    Source: the MMSB document, whose claim that attention is a query over pages this makes true.
    The arguments mean what they mean there; it is for looking and for tests, in double precision
    whatever the inputs are, and gives no gradients. Needs DuckDB.

    Args:
        query: One row per target.
        key: One row per source.
        value: One row per source.
        relation: The edges, from sources to targets; or PyG's ``edge_index``.
        bias: Added to the scores, in the relation's edge order, and to what the relation carries;
            :math:`-\infty` removes an edge. (default: :obj:`None`)
        normalise: Which end of the edges forms the groups. (default: :obj:`"target"`)

    Shapes:
        - **input:** query :math:`(N, H, D)`, key :math:`(M, H, D)`, value :math:`(M, H, D_v)`,
          bias :math:`(E,)`, :math:`(E, 1)` or :math:`(E, H)`
        - **output:** :math:`(N, H, D_v)`, float64

    Raises:
        ValueError: If shapes or the relation's sizes disagree, or a number is NaN or infinite, or
            a score grows beyond double precision.
        ImportError: If DuckDB is missing.

    Example:
        >>> q, k = torch.randn(2, 4, 8), torch.randn(3, 4, 8)
        >>> attention_sql(q, k, k, Relation.complete([0, 3], [0, 2])).shape
        torch.Size([2, 4, 8])
    """
    statement = attention_statement(normalise)
    _check(query, key, value)
    relation = as_relation(relation, (key.size(0), query.size(0)))
    shape = (query.size(0), query.size(1), value.size(2))
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.float64)
    tables = {
        "edges": _edges(relation, query.size(1), bias),
        "queries": _table("query", query),
        "keys": _table("key", key),
        "values": _table("value", value),
        "pages": dict(zip(("page", "head", "channel"), _index(shape), strict=True)),
    }
    with connect("attention_sql") as database:
        for name, columns in tables.items():
            database.register(name, columns)
        rows = database.execute(statement).fetchnumpy()
    out = np.asarray(rows["value"], dtype=np.float64)
    if not np.isfinite(out).all():
        raise ValueError(
            f"scores must be finite in double precision, but {(~np.isfinite(out)).sum()} numbers "
            f"of the result are not, since query times key grows beyond it; scale them down"
        )
    return torch.from_numpy(out).view(shape)


def _index(shape: tuple[int, ...]) -> list[np.ndarray]:
    """The place of every element along each dimension, row by row."""
    return [np.ascontiguousarray(place.reshape(-1)) for place in np.indices(shape)]


def _table(name: str, values: Tensor) -> dict[str, np.ndarray]:
    array = values.detach().cpu().double().contiguous().numpy()
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite, for NaN is NULL in a table, but {(~np.isfinite(array)).sum()} "
            f"of its numbers are not"
        )
    page, head, channel = _index(array.shape)
    return {"page": page, "head": head, "channel": channel, "value": array.reshape(-1)}


def _edges(relation: Relation, heads: int, bias: Tensor | None) -> dict[str, np.ndarray]:
    total = np.zeros((relation.num_edges, heads))
    for term in (bias, relation.bias):
        if term is not None:
            array = term.detach().cpu().double().numpy()
            if array.shape not in {total.shape[:1], (len(total), 1), total.shape}:
                raise ValueError(
                    f"bias must have shape ({len(total)},), ({len(total)}, 1) or {total.shape}, "
                    f"but has {array.shape}"
                )
            total = total + (array[:, None] if array.ndim == 1 else array)
    if np.isnan(total).any() or (total == np.inf).any():
        raise ValueError("bias must hold numbers, or -inf to remove an edge, but has NaN or inf")
    edge, head = _index(total.shape)
    src, dst = relation.edge_index.cpu().numpy()
    return {
        "edge": edge,
        "src": src[edge],
        "dst": dst[edge],
        "head": head,
        "bias": total.reshape(-1),
    }


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} must have shape (nodes, heads, channels), but has {tuple(tensor.shape)}"
            )
    if key.shape[1:] != query.shape[1:] or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            f"must agree in heads, query and key in channels, key and value in rows"
        )
    if query.size(2) == 0:
        raise ValueError(
            f"query {tuple(query.shape)} has no channels; it needs at least one a head"
        )
