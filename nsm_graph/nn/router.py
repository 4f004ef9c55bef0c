"""Token-to-state routing (N3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear

from nsm_graph import ops
from nsm_graph.nn.checks import check_channels, check_choice, check_features, check_slots
from nsm_graph.nn.edge_attention_layer import is_watched, with_weights
from nsm_graph.nn.slot_rows import reset_slot_rows
from nsm_graph.ops.segment import group_softmax, group_sum
from nsm_graph.relation import Relation, as_relation


class Routing(NamedTuple):
    """What routing gives: the summed tokens, the weights, and the edges that carried them."""

    routed: Tensor  #: ``[N, C_t]``, before the output projection
    weights: Tensor  #: ``[E]``, in the relation's edge order
    relation: Relation  #: the edges that were used; sparse with ``top_k``


class TokenToStateRouter(MessagePassing):
    r"""Routes every token to the states of its example.

    .. math::
        z_{e,h} &= W_{h,\mathrm{slot}(j)} \cdot x_i + b_{h,\mathrm{slot}(j)}
        + \log \sigma(\iota_{\mathrm{slot}(j)}) \\
        w_e &= \frac{1}{H} \sum_h \mathrm{softmax}_{e' \text{ leaving } i}(z_{e',h}), \qquad
        r_j = W_o \sum_{e: i \to j} w_e \, x_i

    Source: Neural State Machine flow, 3.1. Differs: the softmax is taken per head and averaged, so
    that the weights of a token sum to 1; the learnable importance :math:`\iota` enters as a bias
    per state (equal importances change nothing); ``top_k`` keeps the k best states of each token
    by averaged weight (ties: the lowest slot) and renormalises.

    Args:
        token_channels: Size of each token, or :obj:`-1` to derive the size from the first input.
        state_channels: Size of each routed output.
        num_states: Slots that the router knows; the width of its logits.
        heads: Number of heads. (default: :obj:`4`)
        top_k: States that each token keeps; ``None`` for all. (default: :obj:`None`)
        routing_reduce: ``"sum"`` as documented, or ``"mean"`` to divide by the number of tokens
            that the state's example offers; use it where segment sizes vary.
            (default: :obj:`"sum"`)

    Shapes:
        - **input:** tokens :math:`(T, C_t)` or the pair (tokens, states), edges from T tokens to N
          states
        - **output:** routed :math:`(N, C)`, with weights :math:`(E,)` if asked for

    Raises:
        ValueError: If the relation's sizes and the inputs disagree, or a slot does not exist.

    Example:
        >>> router = TokenToStateRouter(8, 16, num_states=3)
        >>> relation = Relation.complete([0, 5, 7], [0, 3, 6])
        >>> router(torch.randn(7, 8), relation).shape
        torch.Size([6, 16])
    """

    #: Tensors indexed by slot, with the dimension; slots come first, heads within a slot.
    slot_dims = {"lin_logits.weight": 0, "lin_logits.bias": 0}

    def __init__(
        self,
        token_channels: int,
        state_channels: int,
        num_states: int,
        heads: int = 4,
        *,
        top_k: int | None = None,
        routing_reduce: str = "sum",
    ) -> None:
        check_channels(token_channels=token_channels)
        if min(state_channels, num_states, heads) < 1:
            raise ValueError(
                f"state_channels, num_states and heads must be positive, but are "
                f"{state_channels}, {num_states} and {heads}"
            )
        if top_k is not None and (
            not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= num_states
        ):
            raise ValueError(f"top_k must lie in 1..{num_states} or be None, but is {top_k}")
        check_choice("routing_reduce", routing_reduce, ("sum", "mean"))
        super().__init__(aggr="sum", node_dim=0)
        self.in_channels = self.token_channels = token_channels
        self.out_channels = self.state_channels = state_channels
        self.num_states = num_states
        self.heads = heads
        self.top_k = top_k
        self.routing_reduce = routing_reduce
        self.lin_logits = Linear(token_channels, num_states * heads)
        self.lin_out = Linear(token_channels, state_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin_logits.reset_parameters()
        self.lin_out.reset_parameters()

    def reset_slots(self, slots: Tensor) -> None:
        """Fresh router rows for slots that were just allocated."""
        reset_slot_rows(self.lin_logits, slots, self.num_states)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor | Relation,
        *,
        slots: Tensor | None = None,
        importance: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Runs the forward pass of the module.

        Args:
            x: The tokens, or the pair (tokens, states); the router reads only tokens.
            edge_index: Edges from tokens to states: a :class:`~nsm_graph.Relation` or PyG's
                ``edge_index``.
            slots: Which slot each state row holds, ``[N]``; ``None`` if every example holds slots
                0, 1, 2, ... in order. (default: :obj:`None`)
            importance: Learnable importance of every slot, ``[num_states]``.
                (default: :obj:`None`)
            size: ``(num_tokens, num_states_in_batch)``, needed with a plain ``edge_index`` and
                tokens alone. (default: :obj:`None`)
            return_attention_weights: If :obj:`True`, also returns ``(edge_index, weights)``.
                (default: :obj:`None`)
        """
        if isinstance(x, tuple):
            size = (x[0].size(0), x[1].size(0))
            x = x[0]
        if isinstance(edge_index, Relation):
            size = edge_index.size if size is None else size
        elif size is None:
            raise ValueError(
                "edge_index alone does not say how many states there are; pass (tokens, states), "
                "size=(num_tokens, num_states) or a Relation"
            )
        check_features(x, self.token_channels, "x", self.lin_out.weight)
        if x.size(0) != size[0]:
            raise ValueError(
                f"relation goes from {size[0]} tokens, but x has {x.size(0)} rows; build it from "
                f"the same batch"
            )
        if isinstance(edge_index, Tensor) and torch.compiler.is_compiling():
            # Looking at the indices would break the graph; a wrong one fails where it gathers.
            relation = Relation(edge_index, size)
        else:
            relation = as_relation(edge_index, size)
        self._check_slots(slots, importance, relation)
        routing = self.route(x, self.logits(x, importance), relation, slots)
        out = self.lin_out(routing.routed)
        weights = routing.weights if return_attention_weights else None
        return with_weights(out, routing.relation, weights, return_attention_weights)

    def _check_slots(
        self, slots: Tensor | None, importance: Tensor | None, relation: Relation
    ) -> None:
        if importance is not None and importance.shape != (self.num_states,):
            raise ValueError(
                f"importance must have shape ({self.num_states},), one number for each slot, but "
                f"has {tuple(importance.shape)}"
            )
        if slots is not None:
            check_slots(slots, relation.num_dst, self.num_states)

    def logits(
        self, x: Tensor, importance: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """The logit table ``[T, H, K]`` of all slots, or of the K ``slots`` named."""
        if self.lin_logits.in_channels < 0:
            self.lin_logits(x[:0])  # sizes its lazy weight
        table = F.linear(x, *self.logit_weights(importance, slots))
        return table.unflatten(-1, (self.heads, -1))

    def logit_weights(
        self, importance: Tensor | None = None, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The linear map of the logit table, rows head by head: ``[H K, C_t]`` and ``[H K]``."""
        # The weight is turned, not the table: a softmax over the last dimension is the fast one.
        shape = (self.num_states, self.heads)
        weight = self.lin_logits.weight.unflatten(0, shape).transpose(0, 1)
        bias = self.lin_logits.bias.unflatten(0, shape).transpose(0, 1)
        if slots is not None:
            weight, bias = weight[:, slots], bias[:, slots]
        if importance is not None:
            bias = bias + F.logsigmoid(importance if slots is None else importance[slots])
        return weight.flatten(0, 1), bias.flatten()

    def route(
        self,
        x: Tensor,
        logits: Tensor,
        relation: Relation,
        slots: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Routing:
        """Softmax and routed sum of tokens that are already scored; no output projection.

        ``bias`` ``[E]`` is added to the logits of all heads.
        """
        if is_watched(self):
            routed, weights, used = self._route_watched(x, logits, relation, slots, bias)
        else:
            routed, weights = ops.route(logits, x, relation, slots, bias=bias)
            used = relation
            if self.top_k is not None:
                kept, weights = keep_top_k(relation, weights, self.top_k)
                used = relation.subset(kept)
                src, dst = used.edge_index
                routed = group_sum(x[src] * weights.unsqueeze(1), dst, used.num_dst)
        if self.routing_reduce == "mean":
            routed = routed / relation.in_degree.clamp(min=1).unsqueeze(1).to(routed)
        return Routing(routed, weights, used)

    def _route_watched(
        self,
        x: Tensor,
        logits: Tensor,
        relation: Relation,
        slots: Tensor | None,
        bias: Tensor | None,
    ) -> Routing:
        """The same edge by edge through ``propagate``, for hooks and explainers."""
        src, dst = relation.edge_index
        if slots is None:
            slots = torch.arange(relation.num_dst, device=x.device) % logits.size(2)
        scores = logits[src, :, slots[dst]]
        if bias is not None:
            scores = scores + bias.unsqueeze(1)
        weights = group_softmax(scores, src, relation.num_src).mean(1)
        used, alpha = relation, weights
        if self.top_k is not None:
            kept, weights = keep_top_k(relation, weights, self.top_k)
            used = relation.subset(kept)
            # An explainer counts every edge: those that were dropped stay, with weight zero.
            alpha = torch.zeros_like(alpha).index_copy(0, kept, weights)
        # propagate_type: (x: Tensor, alpha: Tensor)
        routed = self.propagate(relation.edge_index, size=relation.size, x=(x, None), alpha=alpha)
        return Routing(routed, weights, used)

    def message(self, x_j: Tensor, alpha: Tensor) -> Tensor:
        return alpha.unsqueeze(-1) * x_j

    def __repr__(self) -> str:
        top_k = "" if self.top_k is None else f", top_k={self.top_k}"
        return (
            f"{self.__class__.__name__}({self.token_channels}, {self.state_channels}, "
            f"num_states={self.num_states}, heads={self.heads}{top_k})"
        )


def keep_top_k(relation: Relation, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k heaviest edges that leave each source, and their weights, which sum to 1 again.

    Ties go to the lowest target.
    """
    src, dst = relation.edge_index
    # Stable sorts, the least significant key first: target, then weight, then source.
    order = torch.argsort(dst, stable=True)
    order = order[torch.argsort(weights.detach()[order], descending=True, stable=True)]
    order = order[torch.argsort(src[order], stable=True)]
    first_edge = relation.csc.ptr.long()[src[order]]
    rank = torch.arange(order.numel(), device=order.device) - first_edge
    kept = order[rank < k].sort().values
    total = group_sum(weights[kept], src[kept], relation.num_src)
    return kept, weights[kept] / total[src[kept]]
