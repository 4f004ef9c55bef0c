"""What flows out of a machine and back into it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.memory import NodeEdit, StateManager
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


@dataclass(frozen=True, eq=False)
class MachineState:
    """The memory of a batch of streams between two calls.

    Args:
        states: ``[B N, C]``, example by example, each in slot order.
        cell: ``[B N, C]``, the LSTM's cell; ``None`` for a GRU.
        num_tokens: ``[B]``, tokens that each stream has read so far (the position offset).
        slots: ``[N]``, which slot each row of an example holds.
        tail: ``[B, C_t]``, the last token of each stream, for a scan's convolution.
    """

    states: Tensor
    cell: Tensor | None
    num_tokens: Tensor
    slots: Tensor
    tail: Tensor | None = None

    @property
    def num_examples(self) -> int:
        return self.num_tokens.numel()

    def detach(self) -> MachineState:
        """The same memory without its history: truncated backpropagation through time."""
        cell = None if self.cell is None else self.cell.detach()
        tail = None if self.tail is None else self.tail.detach()
        return replace(self, states=self.states.detach(), cell=cell, tail=tail)

    def to(self, device: torch.device | str) -> MachineState:
        """The same memory on another device."""
        return MachineState(
            self.states.to(device),
            None if self.cell is None else self.cell.to(device),
            self.num_tokens.to(device),
            self.slots.to(device),
            None if self.tail is None else self.tail.to(device),
        )

    def edit(self, edit: NodeEdit, manager: StateManager) -> MachineState:
        """The memory after an edit of the node set: survivors keep theirs, the rest is fresh."""
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
    groups: Tensor | None = None  #: ``[G]``, the example of each group; None = one each


class MachineOutput(NamedTuple):
    """Everything a run gives."""

    out: Tensor  #: ``[B, out_channels]``, or ``[T, out_channels]`` for token heads
    tokens: Tensor | None  #: ``[T, C_t]``, per-token read-outs where a read path exists
    state: MachineState  #: to carry into the next call
    record: Record | None  #: where ``record=True``
