"""Deriving a codebook for a machine's states from what it predicts itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsm_graph.nn import StateSnap

if TYPE_CHECKING:
    from nsm_graph.models.machine import NeuralStateMachine


@torch.no_grad()
def fit_snap(
    machine: NeuralStateMachine,
    x: Tensor,
    batch: Tensor | None,
    *,
    batch_size: int | None,
    decay: float,
) -> StateSnap:
    """See :meth:`nsm_graph.NeuralStateMachine.fit_snap`."""
    cell, manager = machine.cell, machine.manager
    channels = getattr(cell.scan, "transition_channels", 0)
    if channels == 0:
        raise ValueError("fit_snap draws transition heads to codes; build the machine with one")
    if manager.num_active < manager.max_states:
        raise ValueError(
            f"fit_snap needs all slots active, but {manager.num_active} of "
            f"{manager.max_states} are; fit it before states are pruned"
        )
    was_training, before = machine.training, cell.snap
    cell.snap = None
    machine.eval()
    try:
        output = machine.run(x, batch, batch_size=batch_size)
    finally:
        machine.train(was_training)
        cell.snap = before
    labels = output.out.argmax(-1)
    if output.tokens is not None:  # a token head: the last token of each example speaks for it
        counts = output.state.num_tokens
        if bool((counts == 0).any()):
            raise ValueError("fit_snap needs a token of every example; leave out empty ones")
        labels = labels[counts.cumsum(0) - 1]
    states = output.state.states.unflatten(0, (output.state.num_examples, -1))
    snap = StateSnap.from_labels(states[..., :channels], labels, decay=decay)
    cell.snap = snap.to(states.device).train(was_training)
    return snap
