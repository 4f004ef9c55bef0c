"""Carries policies out after each optimizer step, and tells of every edit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsm_graph.memory.edit import NodeEdit
from nsm_graph.memory.manager import StateManager
from nsm_graph.memory.policy import KINDS, MemoryView, Policy, Proposal


@dataclass(frozen=True, eq=False)
class EditEvent:
    """One edit of the node set, as it happened."""

    step: int
    kind: str  #: ``"allocate"``, ``"prune"``, ``"merge"`` or ``"split"``
    slots: list  #: the slots concerned; of a merge, pairs of them; of a split, old and new ones
    reason: str
    scores: list[float] | None  #: what the choice came from
    num_active: int  #: afterwards
    edit: NodeEdit  #: to take along what is carried: ``state.edit(event.edit, manager)``

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "step": self.step, "scope": "global", "kind": self.kind, "slots": self.slots,
            "reason": self.reason, "scores": self.scores, "num_active": self.num_active,
        }  # fmt: skip


class MemoryEditor:
    """Asks policies after each step and edits the node set as they propose, within limits.

    Observations between two steps count as one, so that accumulated micro-batches weigh what a
    whole batch does. With several processes moving averages are averaged over them first and fresh
    values are drawn from the step's own seed: all processes make the same edits.

    Args:
        manager: Whose states are edited.
        policies: Asked in this order; each sees what the ones before have left.
        min_states: Never fewer; ``None`` for the manager's. (default: :obj:`None`)
        max_states: Never more; ``None`` for all slots. (default: :obj:`None`)
        protect: Steps in which a state that came by an edit is neither pruned nor merged.
            (default: :obj:`0`)
        cool_down: Steps after an edit in which nobody is asked. (default: :obj:`0`)
        seed: Of fresh values. (default: :obj:`0`)
        on_event: Called with every :class:`EditEvent`. (default: :obj:`None`)

    Example:
        >>> from nsm_graph.memory.policy import Every, Prune
        >>> manager = StateManager(16, max_states=8)
        >>> editor = MemoryEditor(manager, Every(2, Prune(lowest=1)), min_states=7)
        >>> [event.kind for _ in range(6) for event in editor.step()]
        ['prune']
        >>> editor.events[0].slots, manager.num_active
        ([0], 7)
    """

    def __init__(
        self,
        manager: StateManager,
        *policies: Policy,
        min_states: int | None = None,
        max_states: int | None = None,
        protect: int = 0,
        cool_down: int = 0,
        seed: int = 0,
        on_event: Callable[[EditEvent], None] | None = None,
    ) -> None:
        self.min_states = manager.min_states if min_states is None else min_states
        self.max_states = manager.max_states if max_states is None else max_states
        if not manager.min_states <= self.min_states <= self.max_states <= manager.max_states:
            raise ValueError(
                f"expected {manager.min_states} <= min_states <= max_states <= "
                f"{manager.max_states}, the manager's limits, but got {self.min_states} and "
                f"{self.max_states}"
            )
        if manager.num_active > self.max_states:
            raise ValueError(
                f"max_states={self.max_states}, but {manager.num_active} states are active; prune "
                f"some first, or allow more"
            )
        wrong = [p for p in policies if isinstance(p, type) or not callable(p)]
        if wrong:
            raise ValueError(
                f"a policy is called with a view and gives proposals, but {wrong[0]!r} is none; "
                f"pass each policy as an argument of its own"
            )
        self.manager, self.policies = manager, policies
        self.protect, self.cool_down, self.seed, self.on_event = protect, cool_down, seed, on_event
        self.num_steps = 0
        self.events: list[EditEvent] = []
        #: At which step the state of each slot came, and whether an edit brought it.
        self._born = torch.zeros(manager.max_states, dtype=torch.long)
        self._is_new = torch.zeros(manager.max_states, dtype=torch.bool)
        self._num_edits = 0
        self._last_edit: int | None = None
        manager.pool_observations()

    def step(self, loss: Tensor | float | None = None) -> list[EditEvent]:
        """To be called after each optimizer step; the edits that it led to.

        Args:
            loss: Of the step, for policies that look at it; with several processes, the same for
                all of them.
        """
        self.num_steps += 1
        self._average_over_processes()
        self.manager.pool_observations()
        if self._last_edit is not None and self.num_steps - self._last_edit <= self.cool_down:
            return []
        events: list[EditEvent] = []
        for policy in self.policies:
            for proposal in self._ask(policy, loss):
                event = self._carry_out(proposal)
                if event is None:
                    continue
                events.append(event)
                self.events.append(event)
                self._last_edit = self.num_steps
                if self.on_event is not None:
                    self.on_event(event)
        return events

    def view(self, loss: Tensor | float | None = None) -> MemoryView:
        """What policies are shown."""
        manager = self.manager
        slots = manager.slots
        return MemoryView(
            step=self.num_steps,
            loss=float(loss.detach()) if isinstance(loss, Tensor) else loss,
            slots=slots,
            states=manager.bank.detach()[slots],
            signals={name: manager.signal_ema(name)[slots] for name in manager.decays},
            age=self.num_steps - self._born.to(slots.device)[slots],
            num_free=self.max_states - slots.numel(),
        )

    def _ask(self, policy: Policy, loss: Tensor | float | None) -> list[Proposal]:
        proposals = policy(self.view(loss))
        if isinstance(proposals, list) and all(isinstance(p, Proposal) for p in proposals):
            return proposals
        raise ValueError(f"{policy!r} must give a list of proposals, but gave {proposals!r}")

    # Carrying out ###############################################################

    def _carry_out(self, proposal: Proposal) -> EditEvent | None:
        kind, slots, reason, scores = proposal
        if kind not in KINDS:
            raise ValueError(f"a proposal is one of {', '.join(KINDS)}, but is {kind!r}")
        manager = self.manager
        if kind == "allocate":
            own = slots.clamp(max=self.max_states - manager.num_active)
            if int(own) < 1:
                return None
        else:
            stays = self._within_limits(kind, slots)
            if not bool(stays.any()):
                return None
            own, scores = slots[stays], None if scores is None else scores[stays]
        with torch.random.fork_rng(_gpus(manager.bank)):
            torch.manual_seed(hash((self.seed, self.num_steps, self._num_edits)) % 2**63)
            if kind == "allocate":
                edit = manager.allocate(int(own))
            elif kind == "prune":
                edit = manager.prune(slots=own)
            elif kind == "merge":
                edit = manager.merge(own)
            else:
                edit = manager.split(own)
        came = edit.slots_after[~torch.isin(edit.slots_after, edit.slots_before)]
        named = own
        if kind == "allocate":
            named = came
        elif kind == "split":
            named = torch.stack([own, came], 1)
        self._born[came.cpu()], self._is_new[came.cpu()] = self.num_steps, True
        self._num_edits += 1
        return EditEvent(
            self.num_steps, kind, named.tolist(), reason,
            None if scores is None else scores.tolist(), manager.num_active, edit,
        )  # fmt: skip

    def _within_limits(self, kind: str, slots: Tensor) -> Tensor:
        """Which of the slots or pairs an edit may concern, ``[K]``."""
        active = self.manager.slots
        room = self.max_states - active.numel()
        spare = active.numel() - self.min_states
        named = slots.view(len(slots), -1)
        is_there = torch.isin(named, active).all(1)
        if kind != "split":  # states that have just come get their chance
            known = named.masked_fill(~is_there.unsqueeze(1), 0).cpu()
            is_safe = ~self._is_new[known] | (self.num_steps - self._born[known] >= self.protect)
            is_there &= is_safe.all(1).to(slots.device)
        limit = room if kind == "split" else spare
        return is_there & (is_there.cumsum(0) <= limit)

    def _average_over_processes(self) -> None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        emas = [self.manager.signal_ema(name) for name in self.manager.decays]
        together = torch.stack(emas)
        dist.all_reduce(together)
        for ema, mean in zip(emas, together / dist.get_world_size(), strict=True):
            ema.copy_(mean)


def _gpus(x: Tensor) -> list[int]:
    """The devices, beside the processor, whose random numbers an edit draws."""
    return [x.get_device()] if x.is_cuda else []
