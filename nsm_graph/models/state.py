"""What flows out of a machine and back into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsm_graph.memory import NodeEdit, StateManager
from nsm_graph.models.state_rows import StateRows
from nsm_graph.ops.segment import group_sum
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


@dataclass(frozen=True, eq=False)
class MachineState:
    """The memory of a batch of streams between two calls.

    Args:
        states: ``[B N, C]``, example by example, each in slot order.
        cell: ``[B N, C]``, the LSTM's cell; ``None`` for a GRU.
        num_tokens: ``[B]``, tokens that each stream has read so far (the position offset).
        slots: ``[N]``, which slot each row of an example holds; ``[rows]`` of every example with
            an allocator.
        tail: ``[B, C_t]``, the last token of each stream, for a scan's convolution.
        nodes: How the rows fall into examples, where these have node sets of their own.
        log_presence: ``[rows]``, of founding and staying; see
            :class:`~nsm_graph.nn.StateAllocator`.
        log_lasting: ``[rows]``, of staying alone.
        lost_reads: ``[B]``, where presence has a gradient: see :meth:`memory_cost`.
    """

    states: Tensor
    cell: Tensor | None
    num_tokens: Tensor
    slots: Tensor
    tail: Tensor | None = None
    nodes: Partition | None = None
    log_presence: Tensor | None = None
    log_lasting: Tensor | None = None
    lost_reads: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return self.num_tokens.numel()

    @property
    def rows(self) -> Partition:
        """How the rows fall into examples."""
        if self.nodes is not None:
            return self.nodes
        return Partition.uniform(self.num_examples, self.slots.numel(), self.slots.device)

    @property
    def row_slots(self) -> Tensor:
        """The slot of every row, ``[rows]``."""
        return self.slots.repeat(self.num_examples) if self.nodes is None else self.slots

    @property
    def num_states(self) -> Tensor:
        """How many states each example has, ``[B]``."""
        return self.rows.ptr.diff()

    @property
    def expected_states(self) -> Tensor:
        """The same for a loss, ``[B]``: its gradient is that of the states' presence."""
        if self.log_presence is None:
            return self.num_states.to(self.states)
        return group_sum(self.log_presence.exp(), self.rows.batch, self.num_examples)

    def memory_cost(self, per_state: float, worth: float = 10.0) -> Tensor:
        r"""What a loss is charged for states that stay, on average over the examples.

        .. math::
            \frac{c}{B} \sum_b \Big( \sum_{j \in b} \rho_j
            + v \sum_{j \in b} \sum_i a_{ij}^2 (1 - \rho_j) \Big),
            \qquad \rho_j = \prod_{\text{segments}} r_j

        The first part makes states leave. The second counts the reads that are lost with them, by
        tokens i that have a prediction. Weights :math:`a` are taken as they are, so its gradient
        speaks up for states that are read, however sure of them a softmax is, and squared, so that
        a little attention from everywhere is no read. So a state is to stay if it is read at least
        :math:`1 / v` times. Founding is not charged for: novelty decides on it. To charge for it as
        well, add ``cost * state.expected_states.mean()``.

        Args:
            per_state: c, in the unit of the loss.
            worth: v, how many states a read is worth.
        """
        for name, value in (("per_state", per_state), ("worth", worth)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, but is {value}")
        if self.log_lasting is None:
            return per_state * self.num_states.to(self.states).mean()
        cost = self.log_lasting.exp().sum()
        if self.lost_reads is not None:
            cost = cost + worth * self.lost_reads.sum()
        return per_state * cost / self.num_examples

    def detach(self) -> MachineState:
        """The same memory without its history: truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> MachineState:
        """The same memory on another device."""
        moved = self._map(lambda tensor: tensor.to(device))
        return moved if self.nodes is None else replace(moved, nodes=self.nodes.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> MachineState:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **{name: function(x) for name, x in tensors.items()})

    def edit(self, edit: NodeEdit, manager: StateManager) -> MachineState:
        """The memory after an edit of the node set: survivors keep theirs, the rest is fresh.

        Examples with node sets of their own keep these: an edit is then about where new streams
        start.
        """
        if self.nodes is not None:
            return self
        shape = (self.num_examples, edit.slots_before.numel(), -1)
        if not torch.equal(self.slots.cpu(), edit.slots_before.cpu()):
            raise ValueError(
                f"the state holds slots {self.slots.tolist()}, but the edit starts from "
                f"{edit.slots_before.tolist()}; apply edits in the order they were made"
            )
        fresh = manager.bank[edit.fresh_slots]
        fresh = fresh.unsqueeze(1).expand(-1, self.num_examples, -1)
        states = edit.apply(self.states.view(shape), fresh, dim=1).flatten(0, 1)
        cell = None
        if self.cell is not None:
            cell = edit.apply(self.cell.view(shape), dim=1).flatten(0, 1)
        return replace(self, states=states, cell=cell, slots=edit.slots_after)


class NodeSetEvent(NamedTuple):
    """A state that came to the node set of one example, or left it."""

    segment: int  #: of the stream
    example: int
    kind: str  #: ``"allocate"`` or ``"prune"``
    slot: int
    reason: str
    score: float  #: the decision's logit: above 0 founds and stays, but for noise in training
    num_states: int  #: of the example, after this segment's events of this kind

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, with the keys of an :class:`~nsm_graph.memory.EditEvent`."""
        return {
            "scope": "example", "example": self.example, "segment": self.segment,
            "kind": self.kind, "slots": [self.slot], "reason": self.reason,
            "scores": [self.score], "num_active": self.num_states,
        }  # fmt: skip


@dataclass
class Record:
    """What a machine did, step by step; filled where ``record=True``.

    Every list has one entry for each step: a segment of a sequence, a pass over a graph.
    ``relations[t].to_dense(...)`` turns per-edge weights into the documented ``[batch, ...]``
    layouts.
    """

    examples: list[Tensor] = field(default_factory=list)  #: which examples step t read
    tokens: list[Tensor] = field(default_factory=list)  #: which tokens step t read
    relations: list[Relation] = field(default_factory=list)  #: tokens -> states
    routing: list[Tensor | None] = field(default_factory=list)  #: ``[E_t]``
    attention: list[Tensor | None] = field(default_factory=list)  #: ``[E_t, H]``
    gates: list[dict[str, Tensor]] = field(default_factory=list)  #: each ``[N_t, C]``
    states: list[Tensor] = field(default_factory=list)  #: ``[N_t, C]``, after step t
    topologies: list[Relation | None] = field(default_factory=list)  #: states -> states
    margins: list[Tensor | None] = field(default_factory=list)  #: ``[B_t]``, 0 = an unsure snap
    slots: list[Tensor] = field(default_factory=list)  #: ``[N_t]``; with an allocator only
    events: list[NodeSetEvent] = field(default_factory=list)  #: who came and went; the same


class ScanTokens(NamedTuple):
    """What a scan reads."""

    x: Tensor  #: ``[T, C_t]``, the tokens in input order
    examples: Partition  #: whose they are
    tail: Tensor | None  #: ``[B, C_t]``, the token before each example's first


@dataclass(frozen=True, eq=False)
class Reading:
    """What reading a batch gives, before any prediction. Tokens stand in reading order."""

    state: MachineState
    tokens: Tensor  #: ``[T, C_t]``, as they were last read
    token_order: Tensor | None  #: which input token stands at each place; None = as given
    relation: Relation  #: tokens -> the state rows of `before` and `after`, complete
    before: list[Tensor]  #: ``[G N, C]`` in pieces, the states that each group of tokens met
    after: list[Tensor]  #: ``[G N, C]`` in pieces, the states that it left
    reads: Tensor | None  #: ``[T, C_t]``, the scan's per-token reads
    mass: Tensor | None  #: ``[G N]``, shares of routing weight; None without router, or in use
    mass_slots: Tensor | None = None  #: ``[G N]``; None where every group has the state's slots
    groups: Tensor | None = None  #: ``[G]``, the example of each group; None = one each
    #: Instead of `before` and `after`, where examples have node sets of their own.
    own: tuple[StateRows, StateRows] | None = None


class MachineOutput(NamedTuple):
    """Everything a run gives."""

    out: Tensor  #: ``[B, out_channels]``, or ``[T, out_channels]`` for token heads
    tokens: Tensor | None  #: ``[T, C_t]``, per-token read-outs where a read path exists
    state: MachineState  #: to carry into the next call
    record: Record | None  #: where ``record=True``
