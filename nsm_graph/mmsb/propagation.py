"""The stack of propagation passes, with a snapshot of the pages after each (M4, M5, M8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from nsm_graph.memory import NodeEdit
from nsm_graph.mmsb import incremental
from nsm_graph.mmsb.convert_torch import read_encoder
from nsm_graph.mmsb.either import on_class_or_object
from nsm_graph.mmsb.page_cache import PropagationCache
from nsm_graph.mmsb.propagation_pass import PropagationPass
from nsm_graph.mmsb.shadow_graph import (
    ShadowGraph,
    check_shadow_graph,
    edges_of,
    is_fixed,
    partition_of,
)
from nsm_graph.mmsb.steps import Setting
from nsm_graph.nn.checks import check_features
from nsm_graph.partition import Partition
from nsm_graph.topology import complete


class PropagationOutput(NamedTuple):
    """What a run of the stack gives."""

    pages: Tensor  #: ``[P, C]``, the final state: P_L, normalised where the stack has a final norm
    snapshots: tuple[Tensor, ...]  #: P_0 ... P_L, ``[P, C]`` each, as the passes left them
    cache: PropagationCache | None = None  #: where asked for; the stack holds it as well


class Propagation(nn.Module):
    r"""Refines pages pass by pass over a shadow graph: a Transformer is one of these.

    .. math::
        P_{\ell + 1} = \mathrm{pass}_\ell(P_\ell; G_\ell), \qquad \ell = 0 \dots L - 1

    Tokens are pages, attention is routing, the feed-forward network is the page update, weights are
    checkpoints, and the attention mask is the shadow graph :math:`G`. With a Transformer's weights
    and its mask as the shadow graph the outputs are equal; any other topology is one argument away,
    here or at a single call.

    Source: MMSB mapping, "Forward Layer Loop" and "Hidden States = Intermediate Snapshots".

    Args:
        channels: Size of each page.
        num_passes: Number of passes, L.
        heads: Number of heads; divides ``channels``. (default: :obj:`4`)
        shadow_graph: A topology, which every batch asks anew (a dynamic one in every pass, with the
            current pages and ``step`` the pass), or a relation or an ``edge_index`` over all pages
            of a batch; ``None`` for ``topology.complete()``. (default: :obj:`None`)
        final_norm: Normalise the pages after the last pass. (default: :obj:`False`)
        feedforward_channels: See :class:`PropagationPass`, as all that follow.
            (default: :obj:`None`)
        activation: Of the page update. (default: :obj:`"relu"`)
        norm_first: Normalise before, not after. (default: :obj:`False`)
        dropout: Of deltas and updates. (default: :obj:`0.0`)
        attention_dropout: Of attention weights. (default: :obj:`None`)
        feedforward_dropout: Inside the page update. (default: :obj:`None`)
        bias: Whether projections and normalisations have a bias. (default: :obj:`True`)
        eps: Of the normalisation. (default: :obj:`1e-5`)

    Shapes:
        - **input:** pages :math:`(P, C)`, batch :math:`(P,)`; examples are ragged, nothing is
          padded
        - **output:** pages :math:`(P, C)`

    Raises:
        ValueError: If an option is wrong, or sizes, types or the shadow graph disagree.

    Example:
        >>> import torch
        >>> from nsm_graph import topology
        >>> stack = Propagation(16, num_passes=2, heads=2, shadow_graph=topology.causal())
        >>> pages, batch = torch.randn(7, 16), torch.tensor([0, 0, 0, 0, 1, 1, 1])
        >>> stack(pages, batch).shape
        torch.Size([7, 16])
        >>> len(stack.run(pages, batch, shadow_graph=topology.knn(2)).snapshots)
        3
    """

    def __init__(
        self,
        channels: int,
        num_passes: int,
        heads: int = 4,
        *,
        shadow_graph: ShadowGraph | None = None,
        final_norm: bool = False,
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
        if not isinstance(num_passes, int) or isinstance(num_passes, bool) or num_passes < 1:
            raise ValueError(f"num_passes must be an integer of at least 1, but is {num_passes!r}")
        shadow_graph = complete() if shadow_graph is None else shadow_graph
        check_shadow_graph(shadow_graph)
        self.channels, self.heads = channels, heads
        self.passes = nn.ModuleList(
            PropagationPass(
                channels,
                heads,
                feedforward_channels=feedforward_channels,
                activation=activation,
                norm_first=norm_first,
                dropout=dropout,
                attention_dropout=attention_dropout,
                feedforward_dropout=feedforward_dropout,
                bias=bias,
                eps=eps,
            )
            for _ in range(num_passes)
        )
        self.final_norm = nn.LayerNorm(channels, eps, bias=bias) if final_norm else None
        self.shadow_graph: ShadowGraph = shadow_graph
        self._cache: PropagationCache | None = None
        self._num_trainings = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "shadow_graph":
            check_shadow_graph(value)
            # A rule is a module, an edge_index is none; torch lets neither take the other's place.
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Propagation:
        """Training mode; what was kept of a run ends there, since weights are to change."""
        self._num_trainings += bool(mode)
        super().train(mode)
        return self

    @property
    def num_passes(self) -> int:
        return len(self.passes)

    @property
    def cache(self) -> PropagationCache | None:
        """What the last ``run(..., cache=True)`` kept, and updates changed since."""
        return self._cache

    def reset_parameters(self) -> None:
        for module in (*self.passes, self.final_norm, self.shadow_graph):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    # Runs #######################################################################

    def forward(
        self,
        pages: Tensor,
        batch: Tensor | Partition | None = None,
        *,
        shadow_graph: ShadowGraph | None = None,
        attributes: dict[str, Tensor] | None = None,
    ) -> Tensor:
        r"""The final state of the pages.

        Args:
            pages: P_0, one row per page.
            batch: The example of each page, sorted; ``None`` for one. (default: :obj:`None`)
            shadow_graph: Who hears whom in this call; ``None`` for the stack's own.
                (default: :obj:`None`)
            attributes: What is known of each page, for topologies that compare it.
                (default: :obj:`None`)
        """
        return self.run(pages, batch, shadow_graph=shadow_graph, attributes=attributes).pages

    def run(
        self,
        pages: Tensor,
        batch: Tensor | Partition | None = None,
        *,
        shadow_graph: ShadowGraph | None = None,
        attributes: dict[str, Tensor] | None = None,
        cache: bool = False,
    ) -> PropagationOutput:
        r"""Everything: the final state, the snapshots P_0 ... P_L, and what updates need.

        What is kept ends with the weights it was made with: after a training step it has to be
        made again. See :meth:`update` for what is noticed.

        Args:
            pages: As in :meth:`forward`.
            batch: As in :meth:`forward`. (default: :obj:`None`)
            shadow_graph: As in :meth:`forward`. (default: :obj:`None`)
            attributes: As in :meth:`forward`. (default: :obj:`None`)
            cache: Keep pages, keys and values of every pass, for :meth:`update` and
                :meth:`append`. (default: :obj:`False`)
        """
        check_features(pages, self.channels, "pages", self.passes[0].router.lin_qkv.weight)
        graph = self.shadow_graph if shadow_graph is None else shadow_graph
        check_shadow_graph(graph)
        examples = partition_of(batch, pages)
        setting = Setting(examples, graph, attributes)
        keep = incremental.Keeper(self, pages, setting) if cache else None
        snapshots, relation = [pages], None
        for step, refine in enumerate(self.passes):
            if relation is None or not is_fixed(graph):
                relation = edges_of(graph, setting.ask(pages, step))
            query, key, value = refine.project(pages)
            attended, _ = refine.router.attend(query, key, value, relation)
            pages = refine.write(pages, attended)
            snapshots.append(pages)
            if keep is not None:
                keep.add(step, refine, relation, key, value, pages)
        if self.final_norm is not None:
            pages = self.final_norm(pages)
        if keep is not None:
            self._cache = keep.finish(pages)
        return PropagationOutput(pages, tuple(snapshots), self._cache if cache else None)

    # Delta propagation ##########################################################

    def update(
        self,
        pages: Tensor,
        changed: Tensor | list[int] | slice | None,
        *,
        edit: NodeEdit | Tensor | None = None,
        batch: Tensor | Partition | None = None,
        shadow_graph: ShadowGraph | None = None,
        attributes: dict[str, Tensor] | None = None,
        cache: PropagationCache | None = None,
    ) -> Tensor:
        r"""The final state of pages of which some changed; only what depends on them is computed.

        Pass by pass, a page is computed anew if it changed, if an edge enters it from one that
        changed, or if its edges are others than before. The result equals that of
        ``forward(pages)`` to 1e-6 of the norm in float32 and 1e-12 in float64: matrix products of
        other shapes round differently. It carries no gradients.

        Args:
            pages: All pages as they are now, ``[P, C]``.
            changed: Rows of ``pages`` that differ from what the cache has: indices, a mask or a
                slice; ``None`` to compare all. Other rows are not looked at. New ones are found.
            edit: For inserted, deleted and moved pages: the old row of every page, -1 for a new
                one, or a :class:`~nsm_graph.memory.NodeEdit`. Without it, rows beyond those that
                the cache has were appended. (default: :obj:`None`)
            batch: The example of each page where that changed, too; needed where an edit comes to
                several examples. (default: :obj:`None`)
            shadow_graph: Another shadow graph from now on; needed where the one of the cache is a
                relation or an ``edge_index`` and pages come or go. (default: :obj:`None`)
            attributes: As in :meth:`forward`, where they changed. (default: :obj:`None`)
            cache: Of an earlier run; ``None`` for the last. (default: :obj:`None`)

        Raises:
            ValueError: If nothing was kept, the weights changed since, dropout or autocast is
                active, the pages require gradients, or rows, edit and shadow graph do not fit.

        Note:
            Noticed are: weights exchanged or written in place as far as torch counts it
            (``tensor._version``), parts and settings exchanged, another shadow graph of the stack,
            and that the stack was in training mode since. Attributes, an ``edge_index`` and a
            relation's bias may be edited in place: all is then computed again. **Not** noticed are
            fused optimizers and ``parameter.data`` without a call of ``train()`` since: after a
            training step call ``run(pages, cache=True)`` again.

        Example:
            >>> import torch
            >>> from nsm_graph import topology
            >>> stack = Propagation(8, num_passes=2, shadow_graph=topology.window(4)).eval()
            >>> pages = torch.randn(100, 8)
            >>> _ = stack.run(pages, cache=True)
            >>> pages[40] = 0.0
            >>> torch.allclose(stack.update(pages, [40]), stack(pages), atol=1e-6)
            True
        """
        change = incremental.Change(pages, changed, edit, batch, shadow_graph, attributes)
        kept = incremental.cache_of(self, self._cache if cache is None else cache)
        incremental.update(self, kept, change)
        return kept.pages.clone()

    def append(
        self,
        pages: Tensor,
        *,
        attributes: dict[str, Tensor] | None = None,
        cache: PropagationCache | None = None,
    ) -> Tensor:
        r"""The final state ``[n, C]`` of n new pages behind the last one of a single example.

        Takes the new pages alone: for text that is generated token by token. In a causal graph a
        new page costs one row in every pass. Where new pages reach old ones, those are computed as
        well; see ``cache.pages``.

        Args:
            pages: The new pages, ``[n, C]``.
            attributes: As in :meth:`forward`, of all pages. (default: :obj:`None`)
            cache: Of an earlier run; ``None`` for the last. (default: :obj:`None`)

        Raises:
            ValueError: As in :meth:`update`, or if the cache holds several examples.

        Example:
            >>> import torch
            >>> from nsm_graph import topology
            >>> stack = Propagation(8, num_passes=2, shadow_graph=topology.causal()).eval()
            >>> tokens = torch.randn(5, 8)
            >>> _ = stack.run(tokens[:4], cache=True)
            >>> torch.allclose(stack.append(tokens[4:]), stack(tokens)[4:], atol=1e-6)
            True
        """
        kept = incremental.cache_of(self, self._cache if cache is None else cache)
        incremental.append(self, kept, pages, attributes)
        return kept.pages[kept.num_pages - pages.size(0) :].clone()

    # Weights of others ##########################################################

    @on_class_or_object
    def from_torch(
        self_or_class: Any,
        encoder: nn.Module,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        shadow_graph: ShadowGraph | None = None,
    ) -> Propagation:
        r"""The passes of a :class:`torch.nn.TransformerEncoder`, weights copied.

        ``Propagation.from_torch(encoder)`` makes a stack for the encoder;
        ``Propagation(...).from_torch(encoder)`` fills a stack of the same sizes, which keeps its
        shadow graph. A padding mask is a ragged batch here; an attention mask is the shadow graph.
        A stack that is made is in training or evaluation mode as the encoder is.

        Args:
            encoder: A ``TransformerEncoder`` or ``TransformerEncoderLayer``.
            mask: What the encoder would be called with: ``[L, L]`` or ``[heads, L, L]``, see
                :func:`from_mask`. (default: :obj:`None`)
            is_causal: Short for ``shadow_graph=topology.causal()``. (default: :obj:`False`)
            shadow_graph: Any other. (default: :obj:`None`)

        Raises:
            ValueError: If it is no such module or computes something that passes do not, if the
                sizes of a stack that exists are others, or more than one shadow graph is given.

        Example:
            >>> import torch
            >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            >>> encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
            >>> stack, x = Propagation.from_torch(encoder).eval(), torch.randn(5, 16)
            >>> torch.allclose(stack(x), encoder(x[None])[0], atol=1e-5)
            True
        """
        return read_encoder(self_or_class, encoder, mask, is_causal, shadow_graph)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold weights; what was kept of a run can be computed again.
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        graph = f", shadow_graph={self.shadow_graph!r}"
        return f"{self.channels}, num_passes={self.num_passes}, heads={self.heads}{graph}"
