"""Linear maps with a block of rows for each slot: slots first, heads within a slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear


def reset_slot_rows(linear: Linear, slots: Tensor, num_slots: int) -> None:
    """Fresh rows of weight and bias for slots that were just allocated; the others stay."""
    heads = linear.out_channels // num_slots
    fresh = nn.Linear(linear.in_channels, slots.numel() * heads)
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(linear, name).unflatten(0, (num_slots, heads))
            new = getattr(fresh, name).unflatten(0, (slots.numel(), heads))
            rows[slots] = new.to(rows)
