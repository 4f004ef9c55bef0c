"""The bank of state nodes that persists, and who in it is active (N2, N7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nsm_graph.memory.edit import NodeEdit, apply_edit, slot_tensors
from nsm_graph.ops.segment import group_sum


class StateManager(nn.Module):
    r"""Holds the bank of state nodes, their importance and the active mask.

    Two things are called importance and are not the same: ``importance`` is a learnable parameter
    that the router adds to its logits as :math:`\log \sigma(\iota)`; ``importance_ema`` is a
    buffer, the moving average of an observed signal (by default the routing mass).

    Source: Neural State Machine flow, 3.4 and section 3.1 there. Differs: edits happen between
    segments, never inside a step; nothing is edited silently.

    Args:
        state_channels: Size of each state.
        max_states: Number of slots; parameters always have this many rows.
        initial_states: Slots active at first; ``None`` for all. (default: :obj:`None`)
        min_states: Pruning never leaves fewer. (default: :obj:`1`)
        decay: Decay of the routing mass's moving average per observation. (default: :obj:`0.99`)
        watch: Further signals to watch and the horizon of each, in observations: ``"gradient"``,
            ``"update"`` and ``"sharpness"``, which a machine feeds, and any name that you feed
            yourself.
            (default: :obj:`None`)

    Raises:
        ValueError: If the counts contradict each other.

    Example:
        >>> manager = StateManager(16, max_states=8, initial_states=4)
        >>> manager.prune(lowest=1).slots_after.tolist()
        [1, 2, 3]
        >>> manager.allocate(2).slots_after.tolist()
        [0, 1, 2, 3, 4]
    """

    slot_dims = {"bank": 0, "importance": 0, "importance_ema": 0}
    importance_ema: Tensor
    active: Tensor

    def __init__(
        self,
        state_channels: int,
        max_states: int,
        *,
        initial_states: int | None = None,
        min_states: int = 1,
        decay: float = 0.99,
        watch: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        initial_states = max_states if initial_states is None else initial_states
        if state_channels < 1:
            raise ValueError(f"state_channels must be positive, but is {state_channels}")
        if not 1 <= min_states <= initial_states <= max_states:
            raise ValueError(
                f"expected 1 <= min_states <= initial_states <= max_states, but got "
                f"{min_states}, {initial_states} and {max_states}"
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), but is {decay}")
        self.state_channels, self.max_states = state_channels, max_states
        self.initial_states, self.min_states = initial_states, min_states
        #: Of each signal's moving average.
        self.decays = {"routing": decay}
        for name, horizon in (watch or {}).items():
            if not name.isidentifier() or name in ("routing", "importance") or horizon < 1:
                raise ValueError(
                    f"watch maps names of signals, other than routing, to horizons of at least 1, "
                    f"but {name!r} to {horizon}"
                )
            self.decays[name] = 1 - 1 / horizon
        self.bank = nn.Parameter(torch.empty(max_states, state_channels))
        self.importance = nn.Parameter(torch.empty(max_states))
        self.register_buffer("importance_ema", torch.empty(max_states))
        for name in list(self.decays)[1:]:
            self.register_buffer(f"{name}_ema", torch.zeros(max_states))
        self.slot_dims = {**type(self).slot_dims, **{self._buffer(name): 0 for name in self.decays}}
        self.register_buffer("active", torch.empty(max_states, dtype=torch.bool))
        # Who else is indexed by slot. Plain lists: the machine owns the manager, not the reverse.
        self._dependents: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        #: Whether a slot that becomes active keeps the rows it has: set where examples found states
        #: in free slots, and have trained these.
        self.keeps_free_slots = False
        self._slots: tuple[Tensor, int, Tensor] | None = None
        #: Moving averages before a step's first observation, and the sums and counts since, where
        #: an editor wants the observations of a step to count as one.
        self._pools: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh bank, neutral importance, ``initial_states`` active."""
        nn.init.normal_(self.bank, std=0.5)
        nn.init.zeros_(self.importance)
        self.importance_ema.fill_(1.0 / self.max_states)
        for name in list(self.decays)[1:]:
            self.signal_ema(name).zero_()
        self.active.copy_(torch.arange(self.max_states) < self.initial_states)
        self._slots = None

    def reset_slots(self, slots: Tensor) -> None:
        """Fresh values for slots that were just allocated; their EMA starts at the mean."""
        others = self.active.clone()
        others[slots] = False
        with torch.no_grad():
            self.bank[slots] = torch.randn_like(self.bank[slots]) * 0.5
            self.importance[slots] = 0.0
            for name in self.decays:
                ema = self.signal_ema(name)
                ema[slots] = ema[others].mean() if others.any() else 1.0 / self.max_states

    # Who is there ###############################################################

    @property
    def slots(self) -> Tensor:
        """The active slots in ascending order, ``[N]``."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self.active.nonzero().flatten()  # a transform's tensor must not outlive it
        # In-place writes count up a tensor's version, so a stale answer is noticed without looking.
        key = (self.active, -1 if self.active.is_inference() else self.active._version)
        if self._slots is None or self._slots[0] is not key[0] or self._slots[1] != key[1]:
            with torch.inference_mode(False):  # training will use the answer, too
                self._slots = (*key, self.active.nonzero().flatten())
        return self._slots[2]

    @property
    def num_active(self) -> int:
        return self.slots.numel()

    def initial(self, batch_size: int) -> Tensor:
        """The active bank rows, once for each example: ``[batch_size * N, C]``."""
        rows = self.bank if self.num_active == self.max_states else self.bank[self.slots]
        return rows.repeat(batch_size, 1)

    def pool_observations(self) -> None:
        """From now on all observations count as one, until this is called again."""
        self._pools = {}

    def signal_ema(self, name: str) -> Tensor:
        """The moving average of a signal, one number for each slot, ``[max_states]``."""
        if name not in self.decays:
            raise ValueError(
                f"the memory watches {', '.join(self.decays)}, but not {name!r}; name it in watch="
            )
        return getattr(self, self._buffer(name))

    @staticmethod
    def _buffer(name: str) -> str:
        return "importance_ema" if name == "routing" else f"{name}_ema"

    @torch.no_grad()
    def update_importance(
        self, signal: Tensor, slots: Tensor | None = None, name: str = "routing"
    ) -> None:
        r"""Feeds one observation into the moving average.

        .. math:: e_m \leftarrow \gamma e_m + (1 - \gamma) \, \overline{x}_m

        Args:
            signal: One number per state row, :math:`(N,)`; rows of one slot are averaged.
            slots: Slot of each row; ``None`` if examples hold the active slots in order.
            name: Which signal. (default: :obj:`"routing"`)

        Raises:
            ValueError: If the rows and the slots do not match, or the signal is not finite.
        """
        if signal.dim() != 1 or (slots is not None and slots.shape != signal.shape):
            given = "" if slots is None else f" and slots has shape {tuple(slots.shape)}"
            raise ValueError(
                f"signal must hold one number per state row, but has shape {tuple(signal.shape)}"
                f"{given}"
            )
        if slots is None:
            if signal.numel() % self.num_active != 0:
                raise ValueError(
                    f"signal has {signal.numel()} rows, which is no multiple of the "
                    f"{self.num_active} active states; say with slots= which row is which"
                )
            slots = self.slots.repeat(signal.numel() // self.num_active)
        count = torch.bincount(slots, minlength=self.max_states)
        if count.numel() > self.max_states:
            raise ValueError(
                f"slots names slot {count.numel() - 1}, but there are {self.max_states} slots"
            )
        ema = self.signal_ema(name)
        total = group_sum(signal.detach().to(ema), slots, self.max_states)
        before = ema
        if self._pools is not None:
            if name in self._pools:
                before, sums, counts = self._pools[name]
                total, count = total + sums, count + counts
            else:
                before = ema.clone()
        seen = count > 0
        mean = total[seen] / count[seen]
        if not bool(mean.isfinite().all()):
            raise ValueError(
                "signal holds NaN or infinity, which the moving average would never forget"
            )
        decay = self.decays[name]
        ema[seen] = decay * before[seen] + (1 - decay) * mean
        if self._pools is not None:
            self._pools[name] = (before, total, count)

    # Edits ######################################################################

    def register_dependent(self, module: nn.Module) -> None:
        """Every later edit reaches the slot tensors of this module, too.

        Raises:
            ValueError: If one of its parts is indexed by another number of slots, or declares
                ``slot_dims`` without ``reset_slots``.
        """
        for owner in module.modules():
            if not getattr(owner, "slot_dims", {}):
                continue
            name = type(owner).__name__
            num_slots = getattr(owner, "num_states", self.max_states)
            if num_slots != self.max_states:
                raise ValueError(
                    f"{name} is built for {num_slots} slots, but this manager has max_states="
                    f"{self.max_states}; give it num_states={self.max_states}"
                )
            if not hasattr(owner, "reset_slots"):
                raise ValueError(
                    f"{name} declares slot_dims but has no reset_slots(slots), which gives freshly "
                    f"allocated slots their values; add it"
                )
        self._dependents.append(module)

    def register_optimizer(self, optimizer: Optimizer) -> None:
        """Every later edit reaches this optimizer's state.

        Raises:
            ValueError: If the optimizer does not know the bank.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        needed: list[Tensor] = [self.bank]
        if not self.bank.requires_grad:  # frozen: anything else that is indexed by slot will do
            modules = (self, *self._dependents)
            needed = [tensor for module in modules for _, _, tensor, _ in slot_tensors(module)]
        if not any(id(tensor) in known for tensor in needed):
            raise ValueError(
                "the optimizer does not hold the parameter `bank` of this manager; build it from "
                "the parameters of the same machine"
            )
        if not any(optimizer is registered for registered in self._optimizers):
            self._optimizers.append(optimizer)

    def allocate(self, n: int = 1) -> NodeEdit:
        """Activates the n lowest free slots, with fresh values unless examples use free slots, too.

        Raises:
            ValueError: If fewer than n slots are free.
        """
        free = (~self.active).nonzero().flatten()
        if not 1 <= n <= free.numel():
            raise ValueError(
                f"cannot allocate {n} states: {self.num_active} of max_states={self.max_states} "
                f"are active, so 1..{free.numel()} can be added"
            )
        return self._edit_to(self.slots, torch.cat([self.slots, free[:n]]).sort().values)

    def prune(
        self,
        *,
        lowest: int | None = None,
        below: float | None = None,
        slots: Tensor | None = None,
    ) -> NodeEdit:
        """Deactivates states of least ``importance_ema``, ties to the lowest slot, or those named.

        Args:
            lowest: How many to remove.
            below: Remove those whose moving average is smaller; the best ``min_states`` stay.
            slots: Remove these.

        Raises:
            ValueError: If not exactly one rule is given, a slot is not active, or fewer than
                ``min_states`` would be left.
        """
        if slots is not None and lowest is None and below is None:
            self._check_active(slots, "prune")
            return self._edit_to(self.slots, self.slots[~torch.isin(self.slots, slots)])
        spare = self.num_active - self.min_states
        score = self.importance_ema[self.slots]
        if lowest is not None and below is None and slots is None:
            if not 0 <= lowest <= spare:
                raise ValueError(
                    f"cannot prune {lowest} of {self.num_active} states: min_states="
                    f"{self.min_states} must stay, so at most {spare} can go"
                )
            count = lowest
        elif below is not None and lowest is None and slots is None:
            count = min(int((score < below).sum()), spare)
        else:
            raise ValueError("prune takes exactly one of lowest=, below= and slots=")
        gone = score.argsort(stable=True)[:count]
        stays = torch.ones_like(score, dtype=torch.bool)
        stays[gone] = False
        return self._edit_to(self.slots, self.slots[stays])

    def merge(self, pairs: Tensor) -> NodeEdit:
        r"""Merges pairs of active slots, ``[K, 2]``: the first of each holds both from then on.

        Rows are mixed by routing mass, which adds up, and so does the share that importance gives:
        :math:`\sigma(\iota) = \min(\sigma(\iota_a) + \sigma(\iota_b), 1)`.

        Raises:
            ValueError: If a slot is not active or stands in two pairs, or fewer than
                ``min_states`` would be left.
        """
        if pairs.dim() != 2 or pairs.size(1) != 2:
            raise ValueError(
                f"pairs must have shape (K, 2), two slots each, but has {tuple(pairs.shape)}"
            )
        self._check_active(pairs.flatten(), "merge")
        first, second = pairs.unbind(1)
        stays = ~torch.isin(self.slots, second)
        after = self.slots[stays]
        row_of = self._rows_of(self.slots)
        rows = torch.stack([row_of[after], torch.full_like(after, -1)], 1)
        new_row = self._rows_of(after)
        rows[new_row[first], 1] = row_of[second]
        mass = self.importance_ema[self.slots].clamp(min=1e-12)
        weights = mass[rows.clamp(min=0)].masked_fill(rows < 0, 0.0)
        shares = self.importance.detach().sigmoid()
        share = (shares[first] + shares[second]).clamp(max=1 - 1e-4)
        mass = self.importance_ema[first] + self.importance_ema[second]
        edit = NodeEdit(rows, self.slots, after, weights)
        self.edit(edit)
        with torch.no_grad():
            self.importance[first] = share.logit()
            self.importance_ema[first] = mass
        return edit

    def split(self, slots: Tensor, noise: float = 0.01) -> NodeEdit:
        r"""Splits active slots, ``[K]``, into themselves and the lowest free slots.

        Both halves have half the routing mass and, by :math:`\sigma(\iota) \to \sigma(\iota) / 2`,
        half the share of every token, so that other states get what they got before; noise in the
        bank, relative to a row's root mean square, tells them apart.

        Raises:
            ValueError: If a slot is not active, or fewer slots are free.
        """
        self._check_active(slots, "split")
        free = (~self.active).nonzero().flatten()
        if slots.numel() > free.numel():
            raise ValueError(
                f"cannot split {slots.numel()} states: {self.num_active} of max_states="
                f"{self.max_states} are active, so {free.numel()} can be added"
            )
        halves = free[: slots.numel()]
        row_of = self._rows_of(self.slots)
        after, order = torch.cat([self.slots, halves]).sort()
        edit = NodeEdit(torch.cat([row_of[self.slots], row_of[slots]])[order], self.slots, after)
        share = self.importance.detach()[slots].sigmoid() / 2
        mass = self.importance_ema[slots] / 2
        self.edit(edit)
        with torch.no_grad():
            for half in (slots, halves):
                self.importance[half] = share.logit()
                self.importance_ema[half] = mass
                rows = self.bank[half]
                size = rows.square().mean(1, keepdim=True).sqrt()
                self.bank[half] = rows + noise * size * torch.randn_like(rows)
        return edit

    def _rows_of(self, slots: Tensor) -> Tensor:
        """The row of each slot, ``[max_states]``; -1 where it has none."""
        row = torch.full((self.max_states,), -1, device=slots.device)
        row[slots] = torch.arange(slots.numel(), device=slots.device)
        return row

    def _check_active(self, slots: Tensor, what: str) -> None:
        if not isinstance(slots, Tensor) or slots.dim() != 1 or slots.dtype != torch.int64:
            raise ValueError(
                f"slots to {what} must be a tensor of int64 numbers, (K,), but are {slots!r}"
            )
        is_known = torch.isin(slots, self.slots)
        if not bool(is_known.all()) or slots.unique().numel() != slots.numel():
            raise ValueError(
                f"cannot {what} slots {slots.tolist()}: active are {self.slots.tolist()}, each of "
                f"which can be named once"
            )

    def _edit_to(self, before: Tensor, after: Tensor) -> NodeEdit:
        edit = NodeEdit(self._rows_of(before)[after], before, after)
        self.edit(edit)
        return edit

    def edit(self, edit: NodeEdit) -> None:
        """Carries an edit to this manager, every dependent module and every optimizer.

        Raises:
            ValueError: If the edit starts from other slots than the active ones, leaves fewer
                than ``min_states``, or its new slots do not ascend or do not exist.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "the node set cannot change while a graph is traced or during backward; edit "
                "between steps"
            )
        after = edit.slots_after
        if not torch.equal(edit.slots_before.cpu(), self.slots.cpu()):
            raise ValueError(
                f"the edit starts from slots {edit.slots_before.tolist()}, but active are "
                f"{self.slots.tolist()}; make it from the current slots"
            )
        if after.numel() < self.min_states:
            raise ValueError(
                f"the edit leaves {after.numel()} states, but min_states={self.min_states} must "
                f"stay"
            )
        # Carried states keep the order of the edit, the manager that of the slots: one order.
        exists = (after >= 0) & (after < self.max_states)
        if not bool(exists.all()) or bool((after.diff() <= 0).any()):
            raise ValueError(
                f"slots_after must be ascending slots in 0..{self.max_states - 1}, but is "
                f"{after.tolist()}; reorder with new_to_old"
            )
        self.active.zero_()
        self.active[after.to(self.active.device)] = True
        self._slots = None
        if self._pools is not None:  # what was observed before is of other states
            self._pools = {}
        apply_edit(
            edit, self.max_states, [self, *self._dependents], self._optimizers,
            keeps_fresh=self.keeps_free_slots,
        )  # fmt: skip

    # Bookkeeping ################################################################

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._slots = None
        self._pools = None if self._pools is None else {}

    def __getstate__(self) -> dict:
        # A copy has parameters of its own, which the original's optimizers do not hold.
        return {**self.__dict__, "_optimizers": []}

    def extra_repr(self) -> str:
        return (
            f"{self.state_channels}, max_states={self.max_states}, active={self.num_active}, "
            f"min_states={self.min_states}"
        )
