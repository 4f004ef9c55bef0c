"""How a kernel's backward hands over to the reference, where it cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def needs_reference(grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients are to have gradients, or one stands for many: no array holds those."""
    return torch.is_grad_enabled() or any(map(_is_batched, grads))


def _is_batched(grad: Tensor | None) -> bool:
    """As with ``is_grads_batched``."""
    functorch = torch._C._functorch
    return grad is not None and (
        functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
    )


def through_reference(
    reference: Callable[..., Sequence[Tensor | None]],
    given: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of what was given, in a form that has gradients itself.

    Args:
        reference: Makes the results of what was given.
        given: The inputs; None is handed on.
        grads: One for each result; None where nobody asked.
    """
    with torch.enable_grad():
        # Views: what one input makes of another belongs to the caller's graph, not to this one.
        given = [None if x is None else x.view_as(x) for x in given]
        results = reference(*given)
        asked = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
        wanted = [x for x in given if x is not None and x.requires_grad]
        outputs, directions = zip(*asked, strict=True)
        found = torch.autograd.grad(
            outputs, wanted, directions, create_graph=True, allow_unused=True
        )
    rest = iter(found)
    return [next(rest) if x is not None and x.requires_grad else None for x in given]
