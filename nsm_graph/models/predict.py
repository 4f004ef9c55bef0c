"""What a machine predicts from what it has read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.heads import ExampleHead, TokenHead
from nsm_graph.models.state import Reading
from nsm_graph.relation import Relation


def predict(
    head: ExampleHead | TokenHead,
    cell: StateMachineCell,
    reading: Reading,
    at: Tensor | None,
    watch: Callable[[Tensor, Tensor, Tensor | None], None],
) -> tuple[Tensor, Tensor | None]:
    """Predictions in input order, and token read-outs ``[T, C_t]`` of token heads.

    Args:
        head: Of the machine.
        cell: Says which channels of the states belong to its scan.
        reading: What the machine has read.
        at: Token heads: the tokens to predict for; ``None`` for all.
        watch: Is shown the states that the head reads, their slots, and the example of each where
            the head predicts for examples.
    """
    state = reading.state
    num_examples = state.num_examples
    if isinstance(head, ExampleHead):
        batch = state.rows.batch
        watch(state.states, state.row_slots, batch)
        states = _hide_gated(cell, state.states, batch, num_examples)
        return head(states, batch, num_examples, state.row_slots, state.presence), None
    relation, bias = reading.relation, None
    if reading.own is None:
        seen = torch.cat([state.states[:0], *(reading.before if head.causal else reading.after)])
        slots = state.slots.repeat(seen.size(0) // state.slots.numel())
    else:
        rows = reading.own[0 if head.causal else 1]
        seen, slots = rows.states, rows.slots
        relation = Relation.between(relation.sources, rows.nodes)
        if rows.presence.requires_grad or not bool((rows.presence == 1).all()):
            bias = rows.presence.log()[relation.reverse().edge_index[0]]
    watch(seen, slots, None)
    if cell.scan is not None:
        # The scan's channels reach a token through its own read, in order: the states from before
        # or after its segment would make a difference of where segments end.
        seen = F.pad(seen[:, cell.kept_channels :], (cell.kept_channels, 0))
        groups = reading.groups
        if groups is None:
            groups = torch.arange(num_examples, device=seen.device)
        example = groups.repeat_interleave(state.slots.numel())
        seen = _hide_gated(cell, seen, example, num_examples)
    place = None if reading.token_order is None else torch.argsort(reading.token_order)
    asked = at if place is None else place if at is None else place[at]
    out, tokens = head(reading.tokens, seen, relation.reverse(), reading.reads, asked, bias)
    return out, tokens if place is None else tokens[place]


def _hide_gated(
    cell: StateMachineCell, states: Tensor, example: Tensor, num_examples: int
) -> Tensor:
    """In training with a scan: zeroes what the gates wrote, for some of the examples.

    What gates know of short sequences would otherwise be a shortcut past the scan, which alone
    holds at any length.
    """
    kept, scan = cell.kept_channels, cell.scan
    if scan is None or kept == 0 or not cell.training or scan.gated_dropout == 0:
        return states
    is_shown = torch.rand(num_examples, device=states.device) >= scan.gated_dropout
    shown = is_shown.to(states.dtype)[example].unsqueeze(1)
    return torch.cat([states[:, :kept], states[:, kept:] * shown], dim=1)
