"""Hybrid attention: states query tokens (N4)."""

from __future__ import annotations

from torch import Tensor
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_channels, check_features
from nsm_graph.nn.edge_attention_layer import EdgeAttentionLayer, with_weights
from nsm_graph.relation import Relation


class HybridAttention(EdgeAttentionLayer):
    r"""Lets every state attend to the tokens that its edges come from.

    .. math::
        q_j = W_q s_j, \quad k_i = v_i = W_t x_i, \quad
        a_{e,h} = \mathrm{softmax}_{e' \text{ entering } j}
        \frac{q_{j,h} \cdot k_{i,h}}{\sqrt{D}}, \quad
        u_j = W_o \, \Vert_h \sum_e a_{e,h} \, v_{i,h}

    Source: Neural State Machine flow, 3.2, which uses one token projection for keys and values.
    ``separate_values=True`` gives values a projection of their own.

    Args:
        in_channels: Sizes of tokens and of states; :obj:`-1` to derive the size from the first
            input (tokens only). A single number stands for both.
        heads: Number of heads; divides the state channels. (default: :obj:`4`)
        separate_values: Project values apart from keys. (default: :obj:`False`)

    Shapes:
        - **input:** the pair of tokens :math:`(T, C_t)` and states :math:`(N, C)`, edges from
          tokens to states, bias :math:`(E,)`, :math:`(E, 1)` or :math:`(E, H)`
        - **output:** attended :math:`(N, C)`, with weights :math:`(E, H)` if asked for

    Raises:
        ValueError: If sizes, types or the relation disagree.

    Example:
        >>> import torch
        >>> attention = HybridAttention((8, 16), heads=4)
        >>> relation = Relation.complete([0, 5, 7], [0, 3, 6])
        >>> attention((torch.randn(7, 8), torch.randn(6, 16)), relation).shape
        torch.Size([6, 16])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        heads: int = 4,
        *,
        separate_values: bool = False,
    ) -> None:
        if isinstance(in_channels, int):
            in_channels = (in_channels, in_channels)
        token_channels, state_channels = in_channels
        check_channels(token_channels=token_channels)
        super().__init__(state_channels, heads)
        self.in_channels = in_channels
        self.token_channels, self.state_channels = token_channels, state_channels
        self.out_channels = state_channels
        self.separate_values = separate_values
        self.lin_query = Linear(state_channels, state_channels)
        self.lin_token = Linear(token_channels, state_channels)
        self.lin_value = Linear(token_channels, state_channels) if separate_values else None
        self.lin_out = Linear(state_channels, state_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for linear in (self.lin_query, self.lin_token, self.lin_value, self.lin_out):
            if linear is not None:
                linear.reset_parameters()

    def project_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[T, C]``; they do not depend on states, so a loop can hoist them."""
        key = self.lin_token(x)
        return key, key if self.lin_value is None else self.lin_value(x)

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        edge_index: Tensor | Relation,
        *,
        bias: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Runs the forward pass of the module.

        Args:
            x: The pair (tokens, states).
            edge_index: Edges from tokens to states.
            bias: Added to the scores, in edge order. (default: :obj:`None`)
            return_attention_weights: If :obj:`True`, also returns ``(edge_index, weights)``.
                (default: :obj:`None`)
        """
        tokens, states = x
        check_features(tokens, self.token_channels, "x[0] (tokens)", self.lin_query.weight)
        check_features(states, self.state_channels, "x[1] (states)", self.lin_query.weight)
        key, value = self.project_tokens(tokens)
        out, alpha = self.attend(
            self.lin_query(states), key, value, edge_index, bias, return_attention_weights
        )
        return with_weights(self.lin_out(out), edge_index, alpha, return_attention_weights)

    def __repr__(self) -> str:
        sizes = f"({self.token_channels}, {self.state_channels})"
        return f"{self.__class__.__name__}({sizes}, heads={self.heads})"
