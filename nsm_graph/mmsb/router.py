"""Delta routing: which pages a page hears, and how much of each (M4)."""

from __future__ import annotations

from torch import Tensor

from nsm_graph.mmsb.row_linear import RowLinear, row_linear
from nsm_graph.nn.checks import check_features
from nsm_graph.nn.edge_attention_layer import EdgeAttentionLayer, with_weights
from nsm_graph.relation import Relation


class DeltaRouter(EdgeAttentionLayer):
    r"""Sends every page the deltas of the pages that its edges come from.

    .. math::
        (q_i, k_i, v_i) = W \, p_i, \quad
        a_{e,h} = \mathrm{softmax}_{e' \text{ entering } j}
        \frac{q_{j,h} \cdot k_{i,h}}{\sqrt{D}}, \quad
        \Delta_j = W_o \, \Vert_h \sum_e a_{e,h} \, v_{i,h}

    Similarity, softmax mask and weighted messages, over the edges of the shadow graph. Queries,
    keys and values are pages too, made with the checkpoint's matrices. On the complete graph this
    is self-attention: :class:`torch.nn.MultiheadAttention`. A page that no edge enters receives
    only the output bias.

    Source: MMSB mapping, "DeltaRouter + ShadowGraph routing".

    Args:
        channels: Size of each page.
        heads: Number of heads; divides ``channels``. (default: :obj:`4`)
        bias: Whether the projections have a bias. (default: :obj:`True`)
        dropout: Share of the weights that training drops. (default: :obj:`0.0`)

    Shapes:
        - **input:** pages :math:`(P, C)`, edges among them, bias :math:`(E,)` or :math:`(E, H)`
        - **output:** deltas :math:`(P, C)`, with weights :math:`(E, H)` if asked for

    Raises:
        ValueError: If sizes, types or the relation disagree.

    Example:
        >>> import torch
        >>> router = DeltaRouter(16, heads=2)
        >>> router(torch.randn(6, 16), Relation.complete([0, 3, 6], [0, 3, 6])).shape
        torch.Size([6, 16])
    """

    def __init__(
        self, channels: int, heads: int = 4, *, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(channels, heads, dropout=dropout)
        self.in_channels = self.out_channels = self.channels = channels
        self.lin_qkv = RowLinear(channels, 3 * channels, bias=bias)
        self.lin_out = RowLinear(channels, channels, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lin_qkv.reset_parameters()
        self.lin_out.reset_parameters()

    def project(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[P, C]`` of pages."""
        query, key, value = self.lin_qkv(pages).chunk(3, dim=-1)
        return query, key, value

    def project_queries(self, pages: Tensor) -> Tensor:
        """Only the queries of pages."""
        bias = self.lin_qkv.bias
        bias = None if bias is None else bias[: self.channels]
        return row_linear(pages, self.lin_qkv.weight[: self.channels], bias)

    def project_sources(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Only the keys and values of pages."""
        bias = self.lin_qkv.bias
        bias = None if bias is None else bias[self.channels :]
        key, value = row_linear(pages, self.lin_qkv.weight[self.channels :], bias).chunk(2, dim=-1)
        return key, value

    def forward(
        self,
        pages: Tensor,
        edge_index: Tensor | Relation,
        *,
        bias: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        r"""Runs the forward pass of the module.

        Args:
            pages: The pages.
            edge_index: The shadow graph: edges among the pages.
            bias: Added to the scores, in edge order. (default: :obj:`None`)
            return_attention_weights: If :obj:`True`, also returns ``(edge_index, weights)``.
                (default: :obj:`None`)
        """
        check_features(pages, self.channels, "pages", self.lin_qkv.weight)
        attended, alpha = self.attend(
            *self.project(pages), edge_index, bias, return_attention_weights
        )
        return with_weights(self.lin_out(attended), edge_index, alpha, return_attention_weights)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.channels}, heads={self.heads})"
