"""Argument checks that read shapes and types only, so that compiled layers may keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.partition import holds_integers


def check_features(x: Tensor, channels: int, name: str, weight: Tensor | None = None) -> None:
    """Raises unless ``x`` is floating point of shape ``(nodes, channels)``; -1 = any width.

    With the layer's ``weight``, also unless ``x`` has its dtype and device.
    """
    # Two comparisons: a compiled layer cannot look for a number among symbolic sizes.
    if not isinstance(x, Tensor) or x.dim() != 2 or (channels != -1 and x.size(1) != channels):
        width = "channels" if channels == -1 else channels
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must have shape (nodes, {width}), but got {got}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, but has dtype {x.dtype}; use .float()")
    if weight is None or torch.is_autocast_enabled(x.device.type):
        return
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, but the layer is {weight.dtype} on "
            f"{weight.device}; move one with .to(...)"
        )


def check_channels(**channels: int) -> None:
    """Raises unless every given size is positive, or -1 (inferred at the first call)."""
    for name, value in channels.items():
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise ValueError(f"{name} must be a positive integer or -1 (inferred), not {value!r}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, but is {value!r}")


def check_slots(slots: Tensor, num_rows: int, num_slots: int) -> None:
    """Raises unless ``slots`` names one of the slots for each state row."""
    if slots.shape != (num_rows,) or not holds_integers(slots):
        raise ValueError(
            f"slots must have one entry for each of the {num_rows} states, but has shape "
            f"{tuple(slots.shape)} and dtype {slots.dtype}"
        )
    # Values are read at eager boundaries only.
    if slots.numel() > 0 and not torch.compiler.is_compiling():
        least, most = torch.stack(slots.aminmax()).tolist()
        if least < 0 or most >= num_slots:
            raise ValueError(
                f"slots names slot {least if least < 0 else most}, but there are {num_slots}; "
                f"slots count from 0"
            )
