"""State-to-state communication (N6)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_features
from nsm_graph.nn.edge_attention_layer import EdgeAttentionLayer, with_weights
from nsm_graph.relation import Relation


class StateCommunication(EdgeAttentionLayer):
    r"""Lets states attend to each other over a state-state graph.

    .. math::
        s'_j = \mathrm{LayerNorm}\big(s_j + \mathrm{MHA}(s)_j\big)

    Source: Neural State Machine flow, 3.3 (optional part). On the complete graph this is
    :class:`torch.nn.MultiheadAttention` with residual and normalisation. A state that no edge
    enters receives only the output bias.

    Args:
        state_channels: Size of each state.
        heads: Number of heads; divides ``state_channels``. (default: :obj:`4`)

    Shapes:
        - **input:** states :math:`(N, C)`, edges among them, bias :math:`(E,)` or :math:`(E, H)`
        - **output:** states :math:`(N, C)`, with weights :math:`(E, H)` if asked for

    Raises:
        ValueError: If sizes, types or the relation disagree.

    Example:
        >>> import torch
        >>> communication = StateCommunication(16, heads=2)
        >>> communication(torch.randn(6, 16), Relation.complete([0, 3, 6], [0, 3, 6])).shape
        torch.Size([6, 16])
    """

    def __init__(self, state_channels: int, heads: int = 4) -> None:
        super().__init__(state_channels, heads)
        self.in_channels = self.out_channels = self.state_channels = state_channels
        self.lin_qkv = Linear(state_channels, 3 * state_channels)
        self.lin_out = Linear(state_channels, state_channels)
        self.norm = nn.LayerNorm(state_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin_qkv.reset_parameters()
        self.lin_out.reset_parameters()
        self.norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | Relation,
        *,
        bias: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Runs the forward pass of the module.

        Args:
            x: The states.
            edge_index: Edges among the states.
            bias: Added to the scores, in edge order. (default: :obj:`None`)
            return_attention_weights: If :obj:`True`, also returns ``(edge_index, weights)``.
                (default: :obj:`None`)
        """
        check_features(x, self.state_channels, "x", self.lin_qkv.weight)
        query, key, value = self.lin_qkv(x).chunk(3, dim=-1)
        out, alpha = self.attend(query, key, value, edge_index, bias, return_attention_weights)
        out = self.norm(x + self.lin_out(out))
        return with_weights(out, edge_index, alpha, return_attention_weights)

    def scores(self, targets: Tensor, sources: Tensor) -> Tensor:
        """Scores of all pairs, averaged over heads, for :func:`nsm_graph.topology.top_k`.

        Takes states ``[B, N, C]`` and ``[B, M, C]`` and gives ``[B, N, M]``.
        """
        weight, bias = self.lin_qkv.weight, self.lin_qkv.bias
        channels = self.state_channels
        query = linear(targets, weight[:channels], bias[:channels])
        key = linear(sources, weight[channels : 2 * channels], bias[channels : 2 * channels])
        # The mean over heads of their products is the product over all channels.
        return query @ key.mT * (self.head_channels**-0.5 / self.heads)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.state_channels}, heads={self.heads})"
