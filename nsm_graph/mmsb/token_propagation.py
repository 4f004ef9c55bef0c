"""Tokens become pages, pages are propagated: a language model as a stack (M1, M4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsm_graph.mmsb.page_cache import PropagationCache, Stamp
from nsm_graph.mmsb.propagation import Propagation, PropagationOutput
from nsm_graph.mmsb.shadow_graph import ShadowGraph, partition_of
from nsm_graph.partition import Partition, holds_integers
from nsm_graph.topology.checks import show_rows


class PageEmbedding(nn.Module):
    r"""P_0: what each token is, where it stands in its example, and of which type it is.

    Args:
        num_embeddings: Number of tokens there are.
        channels: Size of each page.
        max_positions: Longest example.
        num_types: Number of token types; ``None`` without. (default: :obj:`None`)
        norm: Normalise the sum. (default: :obj:`False`)
        dropout: Share of it that training drops. (default: :obj:`0.0`)
        eps: Of the normalisation. (default: :obj:`1e-5`)

    Shapes:
        - **input:** tokens, their places, and their types :math:`(P,)`
        - **output:** pages :math:`(P, C)`

    Example:
        >>> embedding = PageEmbedding(100, 16, max_positions=8)
        >>> embedding(torch.tensor([7, 7]), torch.tensor([0, 1])).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        channels: int,
        max_positions: int,
        *,
        num_types: int | None = None,
        norm: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(num_embeddings, channels)
        self.position = nn.Embedding(max_positions, channels)
        self.token_type = None if num_types is None else nn.Embedding(num_types, channels)
        self.norm = nn.LayerNorm(channels, eps) if norm else None
        self.dropout = dropout

    def forward(self, tokens: Tensor, place: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Pages of tokens; without ``token_types`` all are of type 0."""
        _check_indices("tokens", tokens, self.word.num_embeddings)
        if place.shape != tokens.shape:
            raise ValueError(
                f"place must have one entry for each of the {tokens.numel()} tokens, but has shape "
                f"{tuple(place.shape)}"
            )
        longest = self.position.num_embeddings
        if place.numel() > 0 and int(place.max()) >= longest:
            raise ValueError(
                f"there are {longest} positions, but an example is longer: "
                f"{show_rows(place, place >= longest)}; cut examples"
            )
        pages = self.word(tokens)
        if self.token_type is not None:
            kind = torch.zeros_like(tokens) if token_types is None else token_types
            _check_indices("token_types", kind, self.token_type.num_embeddings, tokens.numel())
            pages = pages + self.token_type(kind)
        elif token_types is not None:
            raise ValueError("token_types were given, but the embedding has none; leave them out")
        pages = pages + self.position(place)
        if self.norm is not None:
            pages = self.norm(pages)
        return F.dropout(pages, self.dropout, self.training)


class TokenPropagation(nn.Module):
    r"""A stack of passes with the embedding before it and, where there is one, a pooler behind it.

    What :func:`from_hugging_face` makes of BERT and GPT-2. Examples are ragged: a padded batch with
    a mask of ones and zeros is ``tokens[mask]`` with ``batch = mask.nonzero()[:, 0]``.

    Args:
        embedding: Makes pages of tokens.
        stack: Refines the pages.
        pooler: What one vector per example is made with, from its first page; ``None`` without.
            (default: :obj:`None`)

    Shapes:
        - **input:** tokens :math:`(P,)`, batch :math:`(P,)`
        - **output:** pages :math:`(P, C)`

    Example:
        >>> from nsm_graph import topology
        >>> stack = Propagation(16, 2, shadow_graph=topology.causal())
        >>> model = TokenPropagation(PageEmbedding(100, 16, 8), stack).eval()
        >>> tokens = torch.tensor([3, 1, 4, 1, 5])
        >>> _ = model.run(tokens[:4], cache=True)
        >>> torch.allclose(model.append(tokens[4:]), model(tokens)[4:], atol=1e-6)
        True
    """

    def __init__(
        self, embedding: PageEmbedding, stack: Propagation, pooler: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.embedding, self.stack, self.pooler = embedding, stack, pooler

    def forward(
        self,
        tokens: Tensor,
        batch: Tensor | Partition | None = None,
        *,
        token_types: Tensor | None = None,
        shadow_graph: ShadowGraph | None = None,
    ) -> Tensor:
        r"""The final state of the pages.

        Args:
            tokens: One number per page.
            batch: The example of each token, sorted; ``None`` for one. (default: :obj:`None`)
            token_types: Type of each token; ``None`` for 0. (default: :obj:`None`)
            shadow_graph: Who hears whom in this call; ``None`` for the stack's own.
                (default: :obj:`None`)
        """
        given = {"token_types": token_types, "shadow_graph": shadow_graph}
        return self.run(tokens, batch, **given).pages

    def run(
        self,
        tokens: Tensor,
        batch: Tensor | Partition | None = None,
        *,
        token_types: Tensor | None = None,
        shadow_graph: ShadowGraph | None = None,
        cache: bool = False,
    ) -> PropagationOutput:
        """Everything; see :meth:`Propagation.run`."""
        examples = partition_of(batch, tokens)
        if cache:
            self._check_still()
        pages = self.embedding(tokens, examples.place, token_types)
        out = self.stack.run(pages, examples, shadow_graph=shadow_graph, cache=cache)
        if out.cache is not None:
            out.cache.embedding = Stamp(self.embedding)
        return out

    def _check_still(self) -> None:
        if self.embedding.training and self.embedding.dropout > 0:
            raise ValueError(
                "updates need an embedding that gives the same again, but its dropout is active; "
                "call eval() first"
            )

    def append(
        self,
        tokens: Tensor,
        *,
        token_types: Tensor | None = None,
        cache: PropagationCache | None = None,
    ) -> Tensor:
        """The final state of tokens behind the last one; see :meth:`Propagation.append`."""
        self._check_still()
        kept = self.stack.cache if cache is None else cache
        made_by = None if kept is None else kept.embedding
        if made_by is not None and not (made_by.is_of(self.embedding) and made_by.is_current()):
            raise ValueError(
                "the embedding's weights are not those that the cache was made with; call "
                "run(tokens, cache=True) again after every change of them"
            )
        num_pages = 0 if kept is None else kept.num_pages
        place = torch.arange(num_pages, num_pages + tokens.size(0), device=tokens.device)
        with torch.no_grad():
            pages = self.embedding(tokens, place, token_types)
        return self.stack.append(pages, cache=cache)

    def pool(self, pages: Tensor, batch: Tensor | Partition | None = None) -> Tensor:
        r"""One vector per example, ``[B, C]``: :math:`\tanh(W p + b)` of its first page."""
        if self.pooler is None:
            raise ValueError("the model has no pooler; read the pages")
        ptr = partition_of(batch, pages).ptr
        first, is_empty = ptr[:-1], ptr[1:] == ptr[:-1]
        if bool(is_empty.any()):
            raise ValueError(
                f"pool reads the first page of every example, but these have none: "
                f"{is_empty.nonzero().flatten().tolist()}; leave them out"
            )
        return self.pooler(pages[first]).tanh()


def _check_indices(name: str, values: Tensor, count: int, num_rows: int | None = None) -> None:
    num_rows = values.numel() if num_rows is None else num_rows
    if values.shape != (num_rows,) or not holds_integers(values):
        raise ValueError(
            f"{name} must hold one integer for each page, but has shape {tuple(values.shape)} and "
            f"dtype {values.dtype}"
        )
    is_wrong = (values < 0) | (values >= count)
    if bool(is_wrong.any()):
        raise ValueError(f"{name} must lie in 0..{count - 1}, but: {show_rows(values, is_wrong)}")
