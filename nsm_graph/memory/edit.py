r"""Edits of the node set: one type, applied in one place.

Parameters always have a row for each of the ``max_states`` slots; the active ones are gathered. A
module declares which of its tensors are indexed by slot::

    slot_dims = {"lin_logits.weight": 0}      # name -> dimension; slots come first within it
    slot_dims = {"logits": (0, 1)}            # or dimensions, for a tensor over pairs of slots
    def reset_slots(self, slots): ...         # fresh values for slots that were just allocated

and every edit reaches all of them, and the optimizer's state of those that are parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

logger = logging.getLogger("nsm_graph")

#: Optimizer state that scales the steps. A fresh row takes the survivors' mean: the step counter is
#: shared, so a zero second moment would make the row jump, and a zero step size would freeze it.
SECOND_MOMENTS = frozenset(
    {
        *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "step_size"),
        *("row_var", "col_var", "variance"),  # Adafactor's
    }
)

#: What was left alone, said once for each kind of optimizer.
_said: set[tuple[str, str]] = set()


@dataclass(frozen=True, eq=False)
class NodeEdit:
    r"""What became of the active states.

    Args:
        new_to_old: For each new row the old row it comes from, -1 = fresh. ``[N_new]``, or
            ``[N_new, K]`` for rows made from up to K old ones.
        slots_before: Slot of each old row, ``[N_old]``.
        slots_after: Slot of each new row, ``[N_new]``.
        weights: Share of each old row, shaped like ``new_to_old``; ``None`` for equal shares.
            Shares of a row are scaled to sum to 1.

    Example:
        >>> edit = NodeEdit(torch.tensor([1, 2, -1]), torch.arange(3), torch.tensor([1, 2, 5]))
        >>> edit.apply(torch.tensor([[1.0], [2.0], [3.0]]), fresh=torch.tensor([[9.0]]))
        tensor([[2.],
                [3.],
                [9.]])
    """

    new_to_old: Tensor
    slots_before: Tensor
    slots_after: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.new_to_old.size(0) != self.slots_after.size(0):
            raise ValueError(
                f"new_to_old has {self.new_to_old.size(0)} rows, but there are "
                f"{self.slots_after.size(0)} new slots"
            )
        num_old = self.slots_before.size(0)
        if self.new_to_old.numel() > 0:
            least, most = int(self.new_to_old.min()), int(self.new_to_old.max())
            if least < -1 or most >= num_old:
                raise ValueError(
                    f"new_to_old names row {least if least < -1 else most}, but there are "
                    f"{num_old} old rows; use 0..{num_old - 1}, or -1 for a fresh row"
                )
        if self.weights is not None and self.weights.shape != self.new_to_old.shape:
            raise ValueError(
                f"weights must have the shape of new_to_old, {tuple(self.new_to_old.shape)}, but "
                f"has {tuple(self.weights.shape)}"
            )
        if self.weights is not None:
            share = self.weights.masked_fill(self.new_to_old < 0, 0)
            total = share.unsqueeze(1).flatten(1).sum(1)
            if not bool((share >= 0).all() and (self.is_fresh | (total > 0)).all()):
                raise ValueError(
                    "weights must not be negative, and every row that is not fresh needs a "
                    "positive one"
                )

    @property
    def is_fresh(self) -> Tensor:
        """``[N_new]``, true for rows that come from nowhere."""
        return self.new_to_old.unsqueeze(1).flatten(1).lt(0).all(1)

    @property
    def fresh_slots(self) -> Tensor:
        """Slots of the fresh rows."""
        return self.slots_after[self.is_fresh]

    def apply(self, rows: Tensor, fresh: Tensor | float = 0.0, dim: int = 0) -> Tensor:
        """Old rows ``[N_old, ...]`` to new rows ``[N_new, ...]``; survivors bit for bit.

        Args:
            rows: One row per old state along ``dim``.
            fresh: Values of the fresh rows: one row each, or a number.
            dim: Which dimension counts states.
        """
        rows = rows.movedim(dim, 0)
        if rows.size(0) != self.slots_before.size(0):
            raise ValueError(
                f"the edit starts from {self.slots_before.size(0)} states, but rows has "
                f"{rows.size(0)} along dim {dim}"
            )
        if self.new_to_old.dim() == 1 and self.weights is None:
            out = rows.new_zeros(self.new_to_old.size(0), *rows.shape[1:])
            out[~self.is_fresh] = rows[self.new_to_old[~self.is_fresh]]
        else:
            out = self._mix(rows)
        out[self.is_fresh] = fresh
        return out.movedim(0, dim)

    def _mix(self, rows: Tensor) -> Tensor:
        old = self.new_to_old.unsqueeze(1).flatten(1)
        share = (old >= 0).to(rows.dtype) if self.weights is None else self.weights.view_as(old)
        share = share.masked_fill(old < 0, 0.0).to(rows)
        share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        parts = rows[old.clamp(min=0)]
        share = share.view(*share.shape, *[1] * (rows.dim() - 1))
        # Rows that do not take part must not spread a NaN.
        mixed = (parts * share).masked_fill(share == 0, 0.0).sum(1)
        # A row that comes from one old row alone is a copy, bit for bit (-0.0 included).
        only = share.flatten(1).argmax(1)
        copied = parts[torch.arange(only.numel(), device=only.device), only]
        is_copy = (share > 0).sum(1) == 1
        return torch.where(is_copy, copied, mixed)

    def apply_to_slots(self, tensor: Tensor, num_slots: int, dim: int = 0) -> None:
        """Moves the rows of a tensor with a row (or a block of rows) per slot, in place."""
        with torch.no_grad():
            rows = tensor.unflatten(dim, (num_slots, -1)).movedim(dim, 0)
            before = self.slots_before.to(tensor.device)
            after = self.slots_after.to(tensor.device)
            survives = ~self.is_fresh
            moved = self.apply(rows[before])[survives.to(tensor.device)]
            # Allocation and pruning leave survivors in their slots: then this writes equal bits.
            rows[after[survives.to(tensor.device)]] = moved


def slot_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
    """Owner, name, tensor and slot dimension (each of them) of what is indexed by slot."""
    for owner in module.modules():
        for name, dims in getattr(owner, "slot_dims", {}).items():
            tensor = attrgetter(name)(owner)
            if tensor is not None and not isinstance(tensor, UninitializedParameter):
                for dim in (dims,) if isinstance(dims, int) else dims:
                    yield owner, name, tensor, dim


def apply_edit(
    edit: NodeEdit,
    num_slots: int,
    modules: Iterable[nn.Module],
    optimizers: Iterable[Optimizer] = (),
    *,
    keeps_fresh: bool = False,
) -> None:
    """Carries an edit to every tensor indexed by slot and to the optimizers' state of them.

    With ``keeps_fresh`` rows that come from nowhere stay what they are in their slots.
    """
    optimizers = list(optimizers)
    fresh = edit.fresh_slots[:0] if keeps_fresh else edit.fresh_slots
    seen: set[tuple[int, int]] = set()
    owners: list[nn.Module] = []
    for module in modules:
        for owner, _, tensor, dim in slot_tensors(module):
            if (id(tensor), dim) in seen:
                continue
            seen.add((id(tensor), dim))
            edit.apply_to_slots(tensor, num_slots, dim)
            for optimizer in optimizers:
                _edit_optimizer_state(optimizer, tensor, edit, fresh, num_slots, dim)
            if not any(owner is known for known in owners):
                owners.append(owner)
    if fresh.numel() > 0:
        for owner in owners:
            owner.reset_slots(fresh)  # type: ignore[operator]


def _is_per_row(value: object, parameter: Tensor, dim: int) -> bool:
    """Whether an optimizer's state has the rows of its parameter: shaped alike, or factored."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return False
    sizes = zip(value.shape, parameter.shape, strict=True)
    return value.size(dim) == parameter.size(dim) and all(a in (1, b) for a, b in sizes)


def _say_left_alone(optimizer: Optimizer, name: str, value: object) -> None:
    kind = type(optimizer).__name__
    if isinstance(value, Tensor) and value.numel() > 1 and (kind, name) not in _said:
        _said.add((kind, name))
        logger.info(
            "%s keeps %s of shape %s for all states together; edits leave it alone",
            kind, name, tuple(value.shape),
        )  # fmt: skip


def _edit_optimizer_state(
    optimizer: Optimizer,
    parameter: Tensor,
    edit: NodeEdit,
    fresh: Tensor,
    num_slots: int,
    dim: int,
) -> None:
    survivors = edit.slots_after[~edit.is_fresh]
    for name, value in optimizer.state.get(parameter, {}).items():
        if not _is_per_row(value, parameter, dim):
            _say_left_alone(optimizer, name, value)
            continue
        edit.apply_to_slots(value, num_slots, dim)
        if fresh.numel() == 0:
            continue
        with torch.no_grad():
            rows = value.unflatten(dim, (num_slots, -1)).movedim(dim, 0)
            is_moment = name in SECOND_MOMENTS and survivors.numel() > 0
            rows[fresh] = rows[survivors].mean(0, keepdim=True) if is_moment else 0.0
