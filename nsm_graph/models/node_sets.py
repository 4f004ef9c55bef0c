"""Reading with a node set of its own for every example: found, read, prune, segment by segment.

Who is there depends on what the states hold, so nothing but the embedding leaves the loop. Rows are
ragged throughout: example b has :math:`N_b` of them, in the order of their slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsm_graph.memory import StateManager
from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.loop import chunk_size
from nsm_graph.models.segments import SegmentPlan
from nsm_graph.models.state import MachineState, NodeSetEvent, Reading, Record
from nsm_graph.models.state_rows import StateRows, side_by_side
from nsm_graph.nn import StateAllocator
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation
from nsm_graph.topology import NodeSet

#: What one step adds to a record by itself.
STEPWISE = (
    *("relations", "routing", "attention", "gates"),
    *("states", "topologies", "margins", "slots"),
)


class Step(NamedTuple):
    """What one segment read and left."""

    before: StateRows  #: as the segment found them
    after: StateRows  #: as it left them
    mass: Tensor | None  #: routing mass of the states that read
    mass_slots: Tensor
    record: Record | None


def read_node_sets(
    cell: StateMachineCell,
    manager: StateManager,
    tokens: Tensor,
    plain: Tensor,
    plan: SegmentPlan,
    state: MachineState,
    *,
    segment_length: int,
    bptt_segments: int | None,
    checkpoint_segments: int | str | None,
    record: Record | None,
) -> Reading:
    """Reads all segments of a batch; every example founds and prunes states for itself.

    Args:
        cell: Reads one segment.
        manager: Holds the bank that states are founded from.
        tokens: Embedded tokens in input order, ``[T, C_t]``.
        plain: The same without positions: addresses do not depend on where segments end.
        plan: The reading order.
        state: The memory before, examples in input order.
        segment_length: Tokens of a full segment.
        bptt_segments: Cut the history after so many segments.
        checkpoint_segments: The same as :func:`nsm_graph.models.loop.read_segments` takes.
        record: To be filled, where given.
    """
    allocator = cell.allocator
    assert allocator is not None
    reader = _Reader(cell, manager, allocator, is_recorded=record is not None)
    rows = _rows_of(state).reorder(plan.example_order)
    sizes = [step.num_src for step in plan.steps]
    tokens, place = tokens[plan.token_order], plan.place[plan.token_order]
    parts = [part.split(sizes) for part in (tokens, allocator.address(plain)[plan.token_order])]
    inputs = list(zip(*parts, place.split(sizes), (s.sources for s in plan.steps), strict=True))
    first_step = -(-int(state.num_tokens.max()) // segment_length)

    steps: list[Step] = []
    finished: list[StateRows] = []
    size = chunk_size(checkpoint_segments, len(inputs))
    for start in range(0, len(inputs), size):
        arguments = (rows, inputs[start : start + size], start, first_step, bptt_segments)
        if checkpoint_segments is None or not torch.is_grad_enabled():
            rows, done, more = reader.read(*arguments)
        else:
            rows, done, more = checkpoint(reader.read, *arguments, use_reentrant=False)
        finished += done
        steps += more
    rows = side_by_side([rows, *reversed(finished)])
    if record is not None:
        _fill(record, plan, steps, -(-state.num_tokens // segment_length))
    return _reading(rows, steps, tokens, plan, state)


class _Reader:
    """One segment after the other."""

    def __init__(
        self,
        cell: StateMachineCell,
        manager: StateManager,
        allocator: StateAllocator,
        is_recorded: bool,
    ) -> None:
        self.cell, self.manager, self.allocator = cell, manager, allocator
        self.is_recorded = is_recorded

    def read(
        self,
        rows: StateRows,
        inputs: list[tuple],
        first: int,
        first_step: int,
        bptt_segments: int | None,
    ) -> tuple[StateRows, list[StateRows], list[Step]]:
        """A chunk of segments: the rows that read on, those that are finished, what happened."""
        finished, steps = [], []
        for index, (x, address, place, tokens) in enumerate(inputs, first):
            if tokens.num_examples < rows.nodes.num_examples:
                rows, rest = rows.split(tokens.num_examples)
                finished.append(rest)
            if bptt_segments is not None and index > 0 and index % bptt_segments == 0:
                rows = rows.detach()
            step = self.read_segment(rows, x, address, place, tokens, index, first_step)
            rows = step.after
            steps.append(step)
        return rows, finished, steps

    def read_segment(
        self,
        before: StateRows,
        x: Tensor,
        address: Tensor,
        place: Tensor,
        tokens: Partition,
        index: int,
        first_step: int,
    ) -> Step:
        """Found, read, prune: segment ``index`` of the call."""
        cell, allocator = self.cell, self.allocator
        rows, relation, match, events = self.found(before, address, tokens, index)
        bias = match + rows.log_presence[relation.edge_index[1]]
        inputs, weights = cell.hoist(
            x, place, relation, self.manager.importance, None, column=rows.slots, routing_bias=bias
        )
        nodes = NodeSet(rows.nodes, slots=rows.slots, step=first_step + index)
        inputs = cell.connect_nodes(inputs, nodes)
        output = cell(rows.states, rows.cell, inputs, self.is_recorded)
        mass = cell.routing_mass(weights, inputs.relation)

        states = output.states
        rows = rows._replace(states=states, cell=output.propagated.cell)
        after = rows
        staying = allocator.stay(states, rows.nodes, self.manager.min_states)
        if staying is not None:
            gate = staying.log_gate
            rows = rows._replace(
                log_presence=rows.log_presence + gate, log_lasting=rows.log_lasting + gate
            )
            after = rows if bool(staying.stays.all()) else rows.stay(staying.stays)
            if self.is_recorded:
                gone = (~staying.stays).nonzero().flatten()
                who = rows.nodes.batch[gone], rows.slots[gone], staying.logit[gone]
                events += _events(index, "prune", "nothing it holds is needed", *who, after.nodes)
        record = None
        if self.is_recorded:
            record = Record(
                relations=[inputs.relation], routing=[weights], attention=[output.attention],
                gates=[output.propagated.gates], states=[states], topologies=[output.talks],
                margins=[None], slots=[rows.slots], events=events,
            )  # fmt: skip
        return Step(before, after, mass, rows.slots, record)

    def found(
        self, rows: StateRows, address: Tensor, tokens: Partition, index: int
    ) -> tuple[StateRows, Relation, Tensor, list[NodeSetEvent]]:
        """The rows with those that tokens of this segment founded, and who explains what."""
        allocator, num_slots = self.allocator, self.manager.max_states
        relation = Relation.between(tokens, rows.nodes)
        match = allocator.match(address, rows.states, relation)
        explained = allocator.explained(match, rows.log_presence, relation)
        room = num_slots - rows.nodes.ptr.diff()
        founding = allocator.found(address, explained, tokens, room)
        founder = founding.is_founder.nonzero().flatten()
        if founder.numel() == 0:
            return rows, relation, match, []
        example = tokens.batch[founder]
        count = torch.bincount(example, minlength=tokens.num_examples)
        nodes = Partition.from_counts(count)
        slots = _free_slots(rows, nodes, num_slots)
        states = torch.cat(
            [address[founder], self.manager.bank[slots, allocator.address_channels :]], dim=1
        )
        gate, new_cell = founding.log_gate[founder], None
        if rows.cell is not None:
            new_cell = rows.cell.new_zeros(founder.numel(), rows.cell.size(1))
        rows = rows.join(
            StateRows(states, new_cell, slots, gate, torch.zeros_like(gate), nodes), num_slots
        )
        relation = Relation.between(tokens, rows.nodes)
        events = []
        if self.is_recorded:
            who = example, slots, founding.logit[founder]
            events = _events(index, "allocate", "no state explains the token", *who, rows.nodes)
        return rows, relation, allocator.match(address, rows.states, relation), events


def _free_slots(rows: StateRows, wanted: Partition, num_slots: int) -> Tensor:
    """The lowest free slots of each example, as many as it wants."""
    is_free = torch.ones(
        rows.nodes.num_examples, num_slots, dtype=torch.bool, device=rows.slots.device
    )
    is_free[rows.nodes.batch, rows.slots] = False
    # A stable sort puts the free slots of each example first, in order.
    lowest = torch.argsort((~is_free).to(torch.uint8), dim=1, stable=True)
    return lowest[wanted.batch, wanted.place]


def _events(
    segment: int,
    kind: str,
    reason: str,
    example: Tensor,
    slots: Tensor,
    scores: Tensor,
    nodes: Partition,
) -> list[NodeSetEvent]:
    """One event for each state that came or left, and how many there are since."""
    num_states = nodes.ptr.diff().tolist()
    columns = zip(example.tolist(), slots.tolist(), scores.tolist(), strict=True)
    return [
        NodeSetEvent(segment, b, kind, slot, reason, score, num_states[b])
        for b, slot, score in columns
    ]


def _rows_of(state: MachineState) -> StateRows:
    """The carried rows; those of a stream that begins are wholly present."""
    there = torch.zeros_like(state.states[:, 0])
    presence = there if state.log_presence is None else state.log_presence
    lasting = there if state.log_lasting is None else state.log_lasting
    return StateRows(state.states, state.cell, state.row_slots, presence, lasting, state.rows)


def _reading(
    rows: StateRows, steps: list[Step], tokens: Tensor, plan: SegmentPlan, state: MachineState
) -> Reading:
    rows = rows.reorder(torch.argsort(plan.example_order))
    sources = plan.relation.sources
    assert sources is not None
    num_read = torch.zeros_like(state.num_tokens).index_add(
        0, plan.group_example, sources.ptr.diff()
    )
    new_state = replace(
        state,
        states=rows.states,
        cell=rows.cell,
        num_tokens=state.num_tokens + num_read,
        slots=rows.slots,
        nodes=rows.nodes,
        log_presence=rows.log_presence,
        log_lasting=rows.log_lasting,
    )
    nobody = rows.split(0)[0]
    mass = [step.mass for step in steps if step.mass is not None]
    return Reading(
        state=new_state,
        tokens=tokens,
        token_order=plan.token_order,
        relation=plan.relation,
        before=[],
        after=[],
        own=(
            side_by_side([nobody, *(step.before for step in steps)]),
            side_by_side([nobody, *(step.after for step in steps)]),
        ),
        reads=None,
        groups=plan.group_example,
        mass=torch.cat(mass) if mass else None,
        mass_slots=torch.cat([step.mass_slots for step in steps]) if mass else None,
    )


def _fill(record: Record, plan: SegmentPlan, steps: list[Step], first: Tensor) -> None:
    """Notes what happened; ``first`` is the segment of each stream that the call begins with."""
    for step, relation in zip(steps, plan.steps, strict=True):
        part = step.record
        assert part is not None
        examples = plan.example_order[: relation.num_examples]
        record.examples.append(examples)
        for name in STEPWISE:
            getattr(record, name).extend(getattr(part, name))
        rank, age = examples.tolist(), first[examples].tolist()
        record.events += [
            event._replace(example=rank[event.example], segment=event.segment + age[event.example])
            for event in part.events
        ]
    record.tokens += plan.token_order.split([relation.num_src for relation in plan.steps])
