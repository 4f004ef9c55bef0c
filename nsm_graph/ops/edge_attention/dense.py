"""Edge attention on the dense view of a complete or causal relation: scaled_dot_product_attention.

A graph that happens to be complete per example is a batch of dense blocks, and a causal one their
lower triangles. Ragged examples are padded here and nowhere else; long causal ones are attended to
one by one instead.

Legend: B examples, N targets and L sources of one example (padded), H heads, D channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_graph.ops.backend import is_one_by_one
from nsm_graph.relation import Relation


def edge_attention(
    q_NHD: Tensor,
    k_MHD: Tensor,
    v_MHD: Tensor,
    relation: Relation,
    *,
    bias_EH: Tensor | None,
    normalise: str,
    scale: float,
) -> Tensor:
    """Weighted sum of the values into their targets, ``[N, H, D]``."""
    assert relation.sources is not None
    assert relation.targets is not None
    if relation.num_edges == 0:
        # Keeps the graph of gradients: zero, yet connected to every input (and to no value of it).
        empty = q_NHD[:0].sum() + k_MHD[:0].sum() + v_MHD[:0].sum()
        if bias_EH is not None:
            empty = empty + bias_EH.sum()
        return torch.zeros_like(q_NHD) + empty
    if relation.is_causal and bias_EH is None and normalise == "target" and is_one_by_one(relation):
        return _attend_one_by_one(q_NHD, k_MHD, v_MHD, relation, scale)
    q_BHND = relation.targets.pad(q_NHD).transpose(1, 2)
    k_BHLD = relation.sources.pad(k_MHD).transpose(1, 2)
    v_BHLD = relation.sources.pad(v_MHD).transpose(1, 2)
    bias_BHNL = None if bias_EH is None else _dense_bias(bias_EH, relation)
    if normalise == "target":
        out_BHND = _attend(q_BHND, k_BHLD, v_BHLD, relation, bias_BHNL, scale)
    else:
        scores_BHNL = (q_BHND @ k_BHLD.transpose(-1, -2)) * scale
        if bias_BHNL is not None:
            scores_BHNL = scores_BHNL + bias_BHNL
        elif relation.is_causal:
            is_later_NL = torch.ones_like(scores_BHNL[0, 0], dtype=torch.bool).triu(1)
            scores_BHNL = scores_BHNL.masked_fill(is_later_NL, -torch.inf)
        if not relation.targets.is_uniform:
            is_padding = ~relation.targets.mask()
            scores_BHNL = scores_BHNL.masked_fill(is_padding[:, None, :, None], -torch.inf)
        out_BHND = masked_softmax(scores_BHNL, dim=-2) @ v_BHLD
    return relation.targets.unpad(out_BHND.transpose(1, 2))


def masked_softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax in which -inf means absent; a group of absent entries gives zeros, never NaN."""
    is_absent = scores == -torch.inf
    finite = scores.masked_fill(is_absent, torch.finfo(scores.dtype).min)
    return finite.softmax(dim).masked_fill(is_absent, 0.0)


def _dense_bias(bias_EH: Tensor, relation: Relation) -> Tensor:
    return relation.to_dense(bias_EH, fill=-torch.inf).permute(0, 3, 1, 2)


def _attend(
    q_BHND: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    relation: Relation,
    bias_BHNL: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention normalised by target; a target without any source gets zeros on every device.

    Kernels differ in what they return for a row in which everything is masked. Such a row is
    therefore let attend to something: to padding, whose values are zero, or (with a bias) to all,
    and is cleared afterwards.
    """
    assert relation.sources is not None
    if bias_BHNL is not None:
        is_empty_BHN1 = (bias_BHNL == -torch.inf).all(-1, keepdim=True)
        out_BHND = F.scaled_dot_product_attention(
            q_BHND, k_BHLD, v_BHLD, bias_BHNL.masked_fill(is_empty_BHN1, 0.0), scale=scale
        )
        return out_BHND.masked_fill(is_empty_BHN1, 0.0)
    if relation.is_causal:
        # Padding stands after every target that is real, and no target hears what comes later.
        return _attend_causal(q_BHND, k_BHLD, v_BHLD, scale)
    mask_B11L = None
    if not relation.sources.is_uniform:
        mask_BL = relation.sources.mask()
        mask_B11L = (mask_BL | ~mask_BL.any(-1, keepdim=True))[:, None, None, :]
    return F.scaled_dot_product_attention(q_BHND, k_BHLD, v_BHLD, mask_B11L, scale=scale)


def _attend_causal(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float) -> Tensor:
    """Each target from the sources up to its own place."""
    if scale <= 0.0:
        # Kernels scale what is absent as well: -inf times such a number is no -inf.
        q_BHND, scale = q_BHND * scale, 1.0
    return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True, scale=scale)


def _attend_one_by_one(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, relation: Relation, scale: float
) -> Tensor:
    """The same for each example by itself: as many calls as examples, and no padding."""
    assert relation.targets is not None
    counts = relation.targets.ptr.diff().tolist()
    out_NHD = []
    for rows in zip(*(x.split(counts) for x in (q_NHD, k_NHD, v_NHD)), strict=True):
        q_1HND, k_1HND, v_1HND = (x_NHD.transpose(0, 1).unsqueeze(0) for x_NHD in rows)
        if q_1HND.size(2) == 0:
            continue
        out_1HND = _attend_causal(q_1HND, k_1HND, v_1HND, scale)
        out_NHD.append(out_1HND.squeeze(0).transpose(0, 1))
    return torch.cat(out_NHD)
