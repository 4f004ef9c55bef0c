"""What the attention layers share: multi-head attention over edges, as a ``MessagePassing``.

With a plain ``edge_index``, or while an explainer or a hook watches, PyG's ``propagate`` runs
``message`` and ``aggregate``: the reference. With a :class:`~nsm_graph.Relation` the layer calls
:func:`nsm_graph.ops.edge_attention`, which picks the fastest backend that fits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import MessagePassing

from nsm_graph.ops import edge_attention, edge_attention_weights
from nsm_graph.ops.edge_attention import check_bias, joined_bias
from nsm_graph.ops.segment import masked_group_softmax
from nsm_graph.relation import Relation, check_size


class EdgeAttentionLayer(MessagePassing):
    r"""Base of the layers in which target nodes attend to source nodes.

    Subclasses own the projections and call :meth:`attend`.

    Args:
        channels: Size of queries, keys and values together, over all heads.
        heads: Number of heads; divides ``channels``.
        dropout: Share of the attention weights that training drops. Each weight is then looked at
            by itself: the layer runs ``message`` on every kind of edges. (default: :obj:`0.0`)
    """

    def __init__(self, channels: int, heads: int, *, dropout: float = 0.0) -> None:
        if heads < 1 or channels < 1 or channels % heads != 0:
            raise ValueError(
                f"heads must divide the state channels, but {channels} channels and {heads} heads "
                f"were given; choose heads from the divisors of {channels}"
            )
        super().__init__(aggr="sum", node_dim=0)
        self.heads = heads
        self.head_channels = channels // heads
        self.dropout = dropout
        self._alpha: Tensor | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        edges: Tensor | Relation,
        bias: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``[N, C]`` queries to ``[M, C]`` keys; the output is ``[N, C]``.

        Rows may also come split, ``[N, H, D]``. The second result holds the weights ``[E, H]``
        where they were asked for.
        """
        query, key, value = (self.split_heads(rows) for rows in (query, key, value))
        size = (key.size(0), query.size(0))
        if isinstance(edges, Relation):
            check_size(edges, size)
            if not is_watched(self) and not (self.training and self.dropout > 0):
                out = edge_attention(query, key, value, edges, bias=bias)
                alpha = None
                if return_attention_weights:
                    alpha = edge_attention_weights(query, key, edges, bias=bias)
                return out.flatten(1), alpha
            bias = joined_bias(bias, edges, query)
            edges = edges.edge_index
        if edges.layout == torch.strided:
            edges = edges.long()
            bias = None if bias is None else check_bias(bias, edges.size(1), query)
        # propagate_type: (query: Tensor, key: Tensor, value: Tensor, bias: OptTensor)
        try:
            out = self.propagate(edges, size=size, query=query, key=key, value=value, bias=bias)
        except IndexError as error:
            raise ValueError(
                f"edge_index names a node outside the {size[0]} source and {size[1]} target nodes"
            ) from error
        alpha, self._alpha = self._alpha, None
        return out.flatten(1), alpha if return_attention_weights else None

    def split_heads(self, rows: Tensor) -> Tensor:
        """``[N, C]`` -> ``[N, H, D]``; what is split already stays."""
        if rows.dim() == 3:
            return rows
        return rows.unflatten(-1, (self.heads, self.head_channels))

    def message(
        self,
        query_i: Tensor,
        key_j: Tensor,
        value_j: Tensor,
        bias: Tensor | None,
        index: Tensor,
        size_i: int | None,
    ) -> Tensor:
        scores = (query_i * key_j).sum(-1) * self.head_channels**-0.5
        if bias is not None:
            scores = scores + bias
        assert size_i is not None
        alpha = masked_group_softmax(scores, index, size_i)
        alpha = F.dropout(alpha, self.dropout, self.training)
        self._alpha = alpha
        return value_j * alpha.unsqueeze(-1)


def hide_from_explainers(*layers: MessagePassing | None) -> None:
    """Tells PyG's explainers to pass over layers whose edges are not those of the user's graph.

    An explainer's edge mask belongs to the graph that the model was called with. Layers that run on
    edges between tokens and states inside a composition have other edges, whatever their number.
    """
    for layer in layers:
        if layer is not None:
            layer.explain = False


def is_watched(layer: MessagePassing) -> bool:
    """Whether an explainer or a hook needs to see messages."""
    if torch.compiler.is_compiling():
        return False
    if layer.explain:
        return True
    return any(
        getattr(layer, f"_{stage}_forward{when}_hooks")
        for stage in ("propagate", "message", "aggregate", "message_and_aggregate")
        for when in ("", "_pre")
    )


def with_weights(
    out: Tensor,
    edges: Tensor | Relation,
    alpha: Tensor | None,
    return_attention_weights: bool | None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """PyG's convention: ``(out, (edge_index, alpha))`` where weights were asked for, else out."""
    if not return_attention_weights:
        return out
    assert alpha is not None
    return out, (edges.edge_index if isinstance(edges, Relation) else edges, alpha)
