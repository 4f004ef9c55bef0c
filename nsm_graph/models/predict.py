"""What a machine predicts from what it has read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.heads import ExampleHead, TokenHead
from nsm_graph.models.state import Reading
from nsm_graph.models.state_rows import StateRows
from nsm_graph.ops.segment import group_sum
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation

Watch = Callable[[Tensor, Tensor, Tensor | None], None]


def predict(
    head: ExampleHead | TokenHead,
    cell: StateMachineCell,
    reading: Reading,
    at: Tensor | None,
    watch: Watch,
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
        presence = None if state.log_presence is None else state.log_presence.exp()
        return head(states, batch, num_examples, state.row_slots, presence), None
    if reading.own is not None:
        return _predict_own(head, reading, at, watch)
    seen = torch.cat([state.states[:0], *(reading.before if head.causal else reading.after)])
    watch(seen, state.slots.repeat(seen.size(0) // state.slots.numel()), None)
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
    out, tokens = head(reading.tokens, seen, reading.relation.reverse(), reading.reads, asked)
    return out, tokens if place is None else tokens[place]


def _predict_own(
    head: TokenHead, reading: Reading, at: Tensor | None, watch: Watch
) -> tuple[Tensor, Tensor]:
    """Predictions for tokens whose examples have node sets of their own."""
    assert reading.own is not None
    assert reading.token_order is not None
    rows = reading.own[0 if head.causal else 1]
    relation = Relation.between(rows.nodes, reading.relation.sources)
    bias = presence_bias(rows.log_presence, relation)
    watch(rows.states, rows.slots, None)
    place = torch.argsort(reading.token_order)
    asked = place if at is None else place[at]
    out, tokens = head(reading.tokens, rows.states, relation, None, asked, bias)
    return out, tokens[place]


def presence_bias(log_presence: Tensor, relation: Relation) -> Tensor | None:
    """What the presence of sources adds to scores, ``[E]``; None where that is nothing."""
    if not log_presence.requires_grad and not bool(log_presence.any()):
        return None
    return log_presence[relation.edge_index[0]]


@torch.no_grad()
def _reads(head: TokenHead, reading: Reading, asked: Tensor, rows: StateRows) -> Tensor:
    """How often the asked tokens read each state, by their squared weights, ``[N]``."""
    sources = reading.relation.sources
    is_asked = torch.zeros(sources.num_rows, dtype=torch.bool, device=asked.device)
    is_asked[asked] = True
    upto = torch.cat([asked.new_zeros(1), is_asked.cumsum(0)])
    tokens = Partition.from_ptr(upto[sources.ptr])
    relation = Relation.between(rows.nodes, tokens)
    pair = (rows.states, reading.tokens[is_asked])
    bias = presence_bias(rows.log_presence, relation)
    _, (_, alpha) = head.readout(pair, relation, bias=bias, return_attention_weights=True)
    return group_sum(alpha.square().mean(1), relation.edge_index[0], rows.nodes.num_rows)


def lost_reads(head: ExampleHead | TokenHead, reading: Reading, at: Tensor | None) -> Tensor | None:
    r"""How many reads are lost with states that leave, ``[B]``; 0, but for its gradient.

    :math:`\sum_{ij} a_{ij}^2 (1 - \prod r_j)` over the tokens of an example that are asked; a head
    that pools states reads each of them once. See :meth:`MachineState.memory_cost`.
    """
    state = reading.state
    if reading.own is None or state.log_lasting is None or not state.log_lasting.requires_grad:
        return None
    if isinstance(head, ExampleHead):
        gone = 1 - state.log_lasting.exp()
        return group_sum(gone, state.rows.batch, state.num_examples)
    rows = reading.own[0 if head.causal else 1]
    assert reading.token_order is not None
    assert reading.groups is not None
    place = torch.argsort(reading.token_order)
    reads = _reads(head, reading, place if at is None else place[at], rows)
    example = reading.groups[rows.nodes.batch]
    return group_sum(reads * (1 - rows.log_lasting.exp()), example, state.num_examples)


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
