"""Whether a model still computes what its class says: weights alone would not tell."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_as_built(model: nn.Module, library: str, *, except_for: str | None = None) -> None:
    """Raises where a part was exchanged for one from elsewhere, or a hook changes what it gives.

    Args:
        model: The model to read.
        library: Name of the package that its parts come from, beside ``torch.nn``.
        except_for: Last name of parts that may be of any class: an activation of one's own.
    """
    for path, part in model.named_modules():
        place = f"{type(model).__name__}.{path}" if path else type(model).__name__
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        # Their own ones take notes of what passes by.
        if any(not _origin(hook).startswith(library) for hook in hooks):
            raise ValueError(
                f"{place} has a forward hook, which would not act in the stack; remove it"
            )
        if except_for is not None and except_for in path.split("."):
            continue
        origin = type(part).__module__
        if not origin.startswith(("torch.nn.", library)):
            raise ValueError(
                f"{place} is a {origin}.{type(part).__name__}, which may compute something else; "
                f"only parts of {library.rstrip('.')} can be read"
            )


def _origin(hook: Callable) -> str:
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", ""))


def check_activation(
    theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], path: str, name: str
) -> None:
    """Raises unless an activation gives what its name says, at some numbers."""
    x = torch.linspace(-6, 6, 241, dtype=torch.double)
    if not torch.allclose(theirs(x), ours(x), rtol=1e-6, atol=1e-6):
        raise ValueError(f"{path} does not compute {name!r}, as the config says; was it exchanged?")
