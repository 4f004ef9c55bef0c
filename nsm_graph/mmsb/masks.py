"""Attention masks as topologies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm_graph.topology import Edges, Topology
from nsm_graph.topology.base import Pattern
from nsm_graph.topology.rows import Rows, rows_from_keys


def from_mask(mask: Tensor) -> Topology:
    r"""The shadow graph that an attention mask stands for, in the convention of torch.

    Args:
        mask: ``[L, L]``: row i, column j says whether page i may hear page j. A boolean mask is
            true where it may **not**; one of floating point is added to the scores, and
            :math:`-\infty` means not. ``[heads, L, L]`` gives each head biases of its own, over
            the edges that any head has.

    An example of fewer than L pages uses the upper left corner, as under a padding mask.

    Raises:
        ValueError: If the mask is not square, holds NaN, or is no mask; when asked, if an example
            has more than L pages.

    Example:
        >>> mask = torch.nn.Transformer.generate_square_subsequent_mask(3)
        >>> from_mask(mask)(NodeSet.from_counts([3, 2])).edge_index
        tensor([[0, 0, 1, 0, 1, 2, 3, 3, 4],
                [0, 1, 1, 2, 2, 2, 3, 4, 4]])
    """
    if mask.dim() not in (2, 3) or mask.size(-1) != mask.size(-2) or mask.numel() == 0:
        raise ValueError(
            f"from_mask needs a mask of shape (L, L) or (heads, L, L), but got "
            f"{tuple(mask.shape)}; a mask of padding is a ragged batch here"
        )
    mask = mask.detach()
    if mask.dtype == torch.bool:
        is_edge, score = ~mask, None
        if mask.dim() == 3:
            score = torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -torch.inf)
            is_edge = is_edge.any(0)
        return AttentionMask(is_edge) if score is None else _biased(is_edge, score)
    if not mask.is_floating_point():
        raise ValueError(
            f"from_mask needs a boolean mask (true = may not) or one of floating point (added to "
            f"the scores), but got {mask.dtype}"
        )
    is_nan = mask.isnan()
    if bool(is_nan.any()):
        raise ValueError(
            f"from_mask got NaN in {int(is_nan.sum())} places, the first at "
            f"{is_nan.nonzero()[0].tolist()}"
        )
    if bool((mask == torch.inf).any()):
        raise ValueError("from_mask got +inf, after which no weight is a number; use -inf for not")
    is_edge = mask != -torch.inf
    if mask.dim() == 3:
        return _biased(is_edge.any(0), mask)
    if bool((mask[is_edge] == 0).all()):
        return AttentionMask(is_edge)
    return _biased(is_edge, mask.unsqueeze(0))


def _biased(is_edge: Tensor, score: Tensor) -> Topology:
    return AttentionMask(is_edge).biased(MaskBias(score))


class AttentionMask(Pattern):
    """The pairs that a mask lets through, counted from the first page of an example."""

    def __init__(self, is_edge: Tensor) -> None:
        super().__init__()
        self._is_edge = is_edge.cpu()

    def rows(self, num_src: int, num_dst: int) -> Rows:
        longest = self._is_edge.size(0)
        if num_src > longest:
            raise ValueError(
                f"{self!r} is for examples of up to {longest} pages, but one has {num_src}; make a "
                f"mask for that many"
            )
        corner = self._is_edge[:num_dst, :num_src]
        return rows_from_keys(corner.flatten().nonzero().flatten(), (num_src, num_dst))

    def __repr__(self) -> str:
        return f"from_mask({int(self._is_edge.sum())} edges, {self._is_edge.size(0)} pages)"


class MaskBias(nn.Module):
    """What a mask adds to the scores, ``[heads or 1, L, L]``."""

    score: Tensor

    def __init__(self, score: Tensor) -> None:
        super().__init__()
        self.register_buffer("score", score.clone())

    def forward(self, edges: Edges) -> Tensor:
        target = edges.targets.position[edges.target]
        source = edges.sources.position[edges.source]
        return self.score[:, target, source].T
