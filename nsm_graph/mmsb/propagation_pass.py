"""One propagation pass: route, add the deltas, update each page (M4, M5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nsm_graph.mmsb.convert_torch import read_layer
from nsm_graph.mmsb.either import on_class_or_object
from nsm_graph.mmsb.router import DeltaRouter
from nsm_graph.mmsb.row_linear import RowLinear
from nsm_graph.mmsb.shadow_graph import (
    ShadowGraph,
    check_shadow_graph,
    edges_of,
    node_set,
    partition_of,
)
from nsm_graph.nn.checks import check_choice, check_features
from nsm_graph.partition import Partition

#: What may stand between the two matrices of a page update.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class PropagationPass(nn.Module):
    r"""Refines every page once: deltas are routed and added, then each page is updated by itself.

    .. math::
        p &\leftarrow \mathrm{norm}\big(p + \mathrm{route}(p)\big) \\
        p &\leftarrow \mathrm{norm}\big(p + W_2 \, \sigma(W_1 p)\big)

    With ``norm_first`` the normalisation stands before:
    :math:`p + \mathrm{route}(\mathrm{norm}(p))`, and so on. Either is what
    :class:`torch.nn.TransformerEncoderLayer` computes on the complete
    graph; any other shadow graph takes its place.

    Source: MMSB mapping, "Forward Layer Loop". Differs: the source lists the page update before
    residual and normalisation of the message passing; this is the order of the Transformer.

    Args:
        channels: Size of each page.
        heads: Number of heads; divides ``channels``. (default: :obj:`4`)
        feedforward_channels: Inner size of the page update; ``None`` for ``4 * channels``.
            (default: :obj:`None`)
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or a function.
            (default: :obj:`"relu"`)
        norm_first: Normalise before routing and update, not after. (default: :obj:`False`)
        dropout: Share of the deltas and of the updates that training drops. (default: :obj:`0.0`)
        attention_dropout: The same for attention weights; ``None`` for ``dropout``. Dropping them
            takes a number for each edge: ``0.0`` trains with the faster operations.
            (default: :obj:`None`)
        feedforward_dropout: The same inside the page update; ``None`` for ``dropout``.
            (default: :obj:`None`)
        bias: Whether projections and normalisations have a bias. (default: :obj:`True`)
        eps: Of the normalisation. (default: :obj:`1e-5`)

    Shapes:
        - **input:** pages :math:`(P, C)`, a shadow graph, batch :math:`(P,)`
        - **output:** pages :math:`(P, C)`

    Raises:
        ValueError: If an option is wrong, or sizes, types or the shadow graph disagree.

    Example:
        >>> import torch
        >>> from nsm_graph import topology
        >>> refine = PropagationPass(16, heads=2)
        >>> refine(torch.randn(6, 16), topology.ring(1)).shape
        torch.Size([6, 16])
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        *,
        feedforward_channels: int | None = None,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        norm_first: bool = False,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        feedforward_dropout: float | None = None,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not callable(activation):
            check_choice("activation", activation, tuple(ACTIVATIONS))
        inner = 4 * channels if feedforward_channels is None else feedforward_channels
        if not isinstance(inner, int) or inner < 1:
            raise ValueError(f"feedforward_channels must be positive or None, but is {inner!r}")
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        feedforward_dropout = dropout if feedforward_dropout is None else feedforward_dropout
        for name, share in (
            ("dropout", dropout),
            ("attention_dropout", attention_dropout),
            ("feedforward_dropout", feedforward_dropout),
        ):
            if not 0.0 <= share < 1.0:
                raise ValueError(
                    f"{name} must be a share of at least 0 and below 1, but is {share}"
                )
        self.channels, self.heads, self.feedforward_channels = channels, heads, inner
        self.activation, self.norm_first, self.eps = activation, norm_first, eps
        self.dropout, self.feedforward_dropout = dropout, feedforward_dropout
        self.has_bias = bias
        self.router = DeltaRouter(channels, heads, bias=bias, dropout=attention_dropout)
        self.norm_route = nn.LayerNorm(channels, eps, bias=bias)
        self.lin_in = RowLinear(channels, inner, bias=bias)
        self.lin_out = RowLinear(inner, channels, bias=bias)
        self.norm_update = nn.LayerNorm(channels, eps, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.children():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(
        self,
        pages: Tensor,
        shadow_graph: ShadowGraph,
        batch: Tensor | Partition | None = None,
        *,
        step: int = 0,
        attributes: dict[str, Tensor] | None = None,
    ) -> Tensor:
        r"""Runs the forward pass of the module.

        Args:
            pages: The pages.
            shadow_graph: A topology, a relation or an ``edge_index`` over the pages.
            batch: The example of each page, sorted; ``None`` for one. (default: :obj:`None`)
            step: Which pass this is, for topologies that ask. (default: :obj:`0`)
            attributes: What is known of each page, for topologies that compare it.
                (default: :obj:`None`)
        """
        check_features(pages, self.channels, "pages", self.router.lin_qkv.weight)
        check_shadow_graph(shadow_graph)
        nodes = node_set(partition_of(batch, pages), pages, step, attributes)
        relation = edges_of(shadow_graph, nodes)
        attended, _ = self.router.attend(*self.project(pages), relation)
        return self.write(pages, attended)

    def project(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of pages; each row depends on its own page alone."""
        return self.router.project(self.norm_route(pages) if self.norm_first else pages)

    def project_queries(self, pages: Tensor) -> Tensor:
        """Only the queries."""
        return self.router.project_queries(self.norm_route(pages) if self.norm_first else pages)

    def project_sources(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Only keys and values."""
        return self.router.project_sources(self.norm_route(pages) if self.norm_first else pages)

    def write(self, pages: Tensor, attended: Tensor) -> Tensor:
        """Pages after the pass, from those before and what was attended to; row by row."""
        pages = pages + F.dropout(self.router.lin_out(attended), self.dropout, self.training)
        if self.norm_first:
            return pages + self._update(self.norm_update(pages))
        pages = self.norm_route(pages)
        return self.norm_update(pages + self._update(pages))

    def _update(self, pages: Tensor) -> Tensor:
        function = self.activation
        inner = (ACTIVATIONS[function] if isinstance(function, str) else function)(
            self.lin_in(pages)
        )
        inner = F.dropout(inner, self.feedforward_dropout, self.training)
        return F.dropout(self.lin_out(inner), self.dropout, self.training)

    @on_class_or_object
    def from_torch(self_or_class: Any, layer: nn.Module) -> PropagationPass:
        r"""The pass of a :class:`torch.nn.TransformerEncoderLayer`, weights copied.

        ``PropagationPass.from_torch(layer)`` makes one, ``PropagationPass(...).from_torch(layer)``
        fills one of the same sizes.

        Raises:
            ValueError: If it is no such layer, computes something that passes do not, or the sizes
                of a pass that exists are others.

        Example:
            >>> import torch
            >>> from nsm_graph import topology
            >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
            >>> refine, x = PropagationPass.from_torch(layer).eval(), torch.randn(5, 16)
            >>> torch.allclose(refine(x, topology.complete()), layer(x[None])[0], atol=1e-5)
            True
        """
        return read_layer(self_or_class, layer)

    @property
    def drops(self) -> bool:
        """Whether a call in training would draw at random."""
        return max(self.dropout, self.feedforward_dropout, self.router.dropout) > 0

    def __repr__(self) -> str:
        function = self.activation
        name = function if isinstance(function, str) else getattr(function, "__name__", function)
        return (
            f"{self.__class__.__name__}({self.channels}, heads={self.heads}, "
            f"feedforward_channels={self.feedforward_channels}, activation={name!r}, "
            f"norm_first={self.norm_first})"
        )
