"""What the loop over segments reads of tokens, for all segments at once.

Keys, values and projected routed sums depend on tokens only, so they leave the loop. One operation
makes them all, because each alone passes over every token. `README.md` has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.hoist import reference
from nsm_graph.ops.hoist.inputs import Hoisted as Hoisted
from nsm_graph.ops.hoist.inputs import HoistWeights as HoistWeights
from nsm_graph.ops.hoist.inputs import TokenGroups as TokenGroups

BACKENDS = ("cpu", "reference")


def hoist(
    x: Tensor,
    groups: TokenGroups,
    weights: HoistWeights,
    heads: int,
    *,
    backend: str | None = None,
) -> Hoisted:
    r"""Projects and routes all tokens.

    .. math::
        k_i = W_k x_i + b_k, \quad v_i = W_v x_i + b_v, \quad
        w_{ij} = \tfrac{1}{H} \textstyle\sum_h \mathrm{softmax}_j (z_{h,j} \cdot x_i + b_{h,j}),
        \quad r_{gj} = W_o \textstyle\sum_{i \in g} w_{ij} x_i + b_o

    Args:
        x: The tokens, those of a group one after another.
        groups: Which tokens each group holds; the result stands in the order of groups.
        weights: The projections.
        heads: H, of the router.
        backend: ``"cpu"``, ``"reference"``, or ``None`` for the kernel where tokens are in float32
            on a CPU. (default: :obj:`None`)

    Shapes:
        - **input:** x :math:`(T, C_t)`
        - **output:** key and value :math:`(T, C)`, routed :math:`(GN, C)`, weights :math:`(TN,)`

    Raises:
        ValueError: If shapes or types disagree, a token belongs to two groups, or the backend does
            not know what it is given.
    """
    if backend not in (*BACKENDS, None):
        raise ValueError(f"backend must be one of {BACKENDS} or None, but is {backend!r}")
    check_tokens(x, groups, weights, heads)
    if backend is None:
        backend = "cpu" if x.is_cpu and x.dtype == torch.float32 else "reference"
    elif backend == "cpu" and not (x.is_cpu and x.dtype in (torch.float32, torch.float64)):
        raise ValueError(
            f"the kernel takes torch.float32 and torch.float64 on cpu, but x is {x.dtype} on "
            f"{x.device}; ask for backend='reference'"
        )
    if backend == "reference" or groups.first.numel() == 0:
        hoisted = reference.hoist(x, groups, weights, heads)
        return hoisted._replace(weights=hoisted.weights.detach())
    from nsm_graph.ops.hoist import fused

    return fused.hoist(x, groups, weights, heads)


def check_tokens(x: Tensor, groups: TokenGroups, w: HoistWeights, heads: int) -> None:
    """Raises unless everything fits."""
    if x.dim() != 2:
        raise ValueError(f"x must have shape (tokens, channels), but has {tuple(x.shape)}")
    for name, tensor in w._asdict().items():
        is_optional = name in ("value", "value_bias") and w.value is w.value_bias
        if tensor is None and not is_optional:
            raise ValueError(f"weights.{name} is missing")
    channels, width, rows = w.key.size(0), x.size(1), w.logits.size(0)
    if heads < 1 or rows == 0 or rows % heads != 0:
        raise ValueError(f"heads={heads} must divide the {rows} rows of weights.logits")
    sizes = {
        "key": (channels, width), "key_bias": (channels,), "value": (channels, width),
        "value_bias": (channels,), "logits": (rows, width), "logits_bias": (rows,),
        "out": (channels, width), "out_bias": (channels,),
    }  # fmt: skip
    for (name, size), tensor in zip(sizes.items(), w, strict=True):
        if tensor is None:  # values are keys
            continue
        if (tensor.shape, tensor.dtype, tensor.device) != (size, x.dtype, x.device):
            raise ValueError(
                f"weights.{name} must have shape {size} in {x.dtype} on {x.device}, but has "
                f"{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
    first, ptr = groups
    for name, index in (("first", first), ("ptr", ptr)):
        if index.dim() != 1 or index.dtype != torch.int64 or not index.is_cpu:
            raise ValueError(
                f"groups.{name} must have one dimension in torch.int64 on cpu, but has "
                f"{index.dim()} in {index.dtype} on {index.device}"
            )
    if ptr.numel() != first.numel() + 1 or int(ptr[0]) != 0 or bool((ptr.diff() < 1).any()):
        raise ValueError(
            f"groups.ptr must begin at 0 and grow {first.numel()} times, once a group, but is "
            f"{ptr.tolist()[:8]} ... ({ptr.numel()} numbers)"
        )
    if first.numel() > 0:
        end = first + ptr.diff()
        if int(first.min()) < 0 or int(end.max()) > x.size(0):
            raise ValueError(
                f"groups reach from token {int(first.min())} to {int(end.max())}, but x has "
                f"{x.size(0)} rows"
            )
        order = first.argsort()
        left, right = order[:-1], order[1:]
        shared = (end[left] > first[right]).nonzero().flatten()
        if shared.numel() > 0:
            # Every group writes the gradients of its tokens.
            a, b = int(left[shared[0]]), int(right[shared[0]])
            raise ValueError(
                f"a token may belong to one group, but group {a} has tokens {int(first[a])} to "
                f"{int(end[a]) - 1} and group {b} has tokens {int(first[b])} to "
                f"{int(end[b]) - 1}; give x a copy of what both read, or hoist them separately"
            )
