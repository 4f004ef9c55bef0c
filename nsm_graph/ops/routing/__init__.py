"""Routing: softmax over the states of each token, mean over heads, weighted sum into states.

The router's logits are linear in the token, one column per state and head, so the scores come as a
table per token and not as dot products of node features; that is what sets this operation apart
from :func:`nsm_graph.ops.edge_attention` with ``normalise="source"``.
"""

from __future__ import annotations

from torch import Tensor

from nsm_graph.ops.backend import choose_backend
from nsm_graph.ops.routing import dense, reference
from nsm_graph.relation import Relation, check_size

IMPLEMENTATIONS = {"reference": reference.route, "dense": dense.route}


def route(
    logits: Tensor,
    x: Tensor,
    relation: Relation,
    column: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Routes tokens to states.

    .. math::
        w_{e,h} = \mathrm{softmax}_{e' \text{ leaving } i} \big(z_{i,h,c(j)} + b_e\big), \qquad
        w_e = \tfrac{1}{H} \textstyle\sum_h w_{e,h}, \qquad
        r_j = \sum_{e: i \to j} w_e \, x_i

    Args:
        logits: The table z: one logit per token, head and column.
        x: The tokens.
        relation: From tokens to states.
        column: Which column of the table each state reads; ``None`` if the i-th state of every
            example reads the i-th of its K columns. (default: :obj:`None`)
        bias: Added to the logits of all heads, in edge order. (default: :obj:`None`)
        backend: ``"reference"``, ``"dense"`` or ``None`` to choose. (default: :obj:`None`)

    Shapes:
        - **input:** logits :math:`(T, H, K)`, x :math:`(T, C)`, column :math:`(N,)`, bias
          :math:`(E,)`
        - **output:** routed :math:`(N, C)`, weights :math:`(E,)` in edge order

    Raises:
        ValueError: If shapes or the relation's sizes disagree, it is open which column a state
            reads, or the backend is unknown or cannot serve this call.

    Example:
        >>> import torch
        >>> relation = Relation.complete([0, 3], [0, 2])
        >>> routed, weights = route(torch.zeros(3, 4, 2), torch.ones(3, 1), relation)
        >>> routed.flatten().tolist(), weights.tolist()
        ([1.5, 1.5], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    """
    if backend not in (*IMPLEMENTATIONS, None):
        raise ValueError(
            f"backend of routing must be one of {sorted(IMPLEMENTATIONS)} or None, but is "
            f"{backend!r}"
        )
    if x.dim() != 2:
        raise ValueError(f"x must have shape (tokens, channels), but has {tuple(x.shape)}")
    if logits.dim() != 3 or logits.size(0) != x.size(0):
        raise ValueError(
            f"logits must have shape ({x.size(0)}, heads, columns), but has {tuple(logits.shape)}"
        )
    num_columns = logits.size(2)
    check_size(relation, (x.size(0), relation.num_dst))
    if column is not None and column.shape != (relation.num_dst,):
        raise ValueError(
            f"column must name one column for each of the {relation.num_dst} states, but has "
            f"shape {tuple(column.shape)}"
        )
    if column is None and not _is_column_by_position(relation, num_columns):
        raise ValueError(
            f"{relation} does not give every example {num_columns} states, as many as there are "
            f"columns in logits; say with column= which column each state reads"
        )
    if bias is not None and bias.shape != (relation.num_edges,):
        raise ValueError(
            f"bias must hold one number for each of the {relation.num_edges} edges, but has shape "
            f"{tuple(bias.shape)}"
        )
    if backend == "dense" and relation.is_causal:
        raise ValueError(
            'backend "dense" of routing needs a complete relation, but this one is causal; use '
            'backend="reference" or None'
        )
    name = choose_backend(relation, x.dtype, backend, normalise="source").name
    # The scores are a table here: there are no kernels for them on general edges.
    implementation = IMPLEMENTATIONS.get(name, reference.route)
    return implementation(logits, x, relation, column, bias)


def _is_column_by_position(relation: Relation, num_columns: int) -> bool:
    if relation.targets is None:
        return num_columns > 0 and relation.num_dst % num_columns == 0
    return relation.targets.is_uniform and relation.targets.max_count in (0, num_columns)
