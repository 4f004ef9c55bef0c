"""Policies: when the node set changes, whom it concerns, and how many (N7).

A policy is any function of a :class:`MemoryView` that gives a list of :class:`Proposal`. Those here
say whom and how many; :class:`Every` and :class:`OnPlateau` wrap another and say when. Limits are
the editor's (:class:`~nsm_graph.memory.MemoryEditor`), which carries proposals out.

A policy of your own::

    def drop_the_shortest(view):
        shortest = view.states.norm(dim=1).argmin()
        if view.states[shortest].norm() > 0.1:
            return []
        return [Proposal("prune", view.slots[shortest].view(1), "short")]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("allocate", "prune", "merge", "split")


class MemoryView(NamedTuple):
    """What a policy sees after a step: the active states, in the order of their slots."""

    step: int  #: optimizer steps so far
    loss: float | None  #: of the step, where the editor is told
    slots: Tensor  #: ``[N]``
    states: Tensor  #: ``[N, C]``, rows of the bank
    signals: Mapping[str, Tensor]  #: moving averages by name, ``[N]`` each
    age: Tensor  #: ``[N]``, steps since a state came, of the first ones since the editor did
    num_free: int  #: slots that could be allocated

    @property
    def occupancy(self) -> float:
        r"""How much of the memory is used: the effective number of states over their number.

        :math:`\exp(-\sum_j p_j \log p_j) / N` of the routing mass p; 1 where all are used alike.
        """
        share = self.signals["routing"].double()
        share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
        entropy = torch.special.entr(share).sum()
        return float(entropy.exp()) / max(share.numel(), 1)


class Proposal(NamedTuple):
    """One edit that a policy would like.

    Args:
        kind: ``"allocate"``, ``"prune"``, ``"merge"`` or ``"split"``.
        slots: Prune and split: the slots, ``[K]``. Merge: pairs of them, ``[K, 2]``. Allocate:
            one number, how many.
        reason: For the log.
        scores: What the choice came from, one number for each slot or pair. (default: :obj:`None`)
    """

    kind: str
    slots: Tensor
    reason: str
    scores: Tensor | None = None


Policy = Callable[[MemoryView], list[Proposal]]


# Whom, and how many ###############################################################


@dataclass(frozen=True)
class Prune:
    """Removes states whose signal is low.

    Args:
        below: Those under this share of the mean of all active states. (default: :obj:`None`)
        lowest: So many of the lowest. (default: :obj:`None`)
        signal: Which moving average. (default: :obj:`"routing"`)

    Raises:
        ValueError: Unless exactly one rule is given.
    """

    below: float | None = None
    lowest: int | None = None
    signal: str = "routing"

    def __post_init__(self) -> None:
        if (self.below is None) == (self.lowest is None):
            raise ValueError("Prune takes exactly one of below= and lowest=")
        given = self.below if self.lowest is None else self.lowest
        if given is None or not given > 0:
            raise ValueError(f"Prune takes a positive number, but is given {given}")

    def __call__(self, view: MemoryView) -> list[Proposal]:
        score = _signal(view, self.signal)
        order = score.argsort(stable=True)
        if self.lowest is not None:
            order, reason = order[: self.lowest], f"{self.signal} is lowest"
        else:
            assert self.below is not None
            order = order[score[order] < self.below * score.mean()]
            reason = f"{self.signal} below {self.below:g} of the mean"
        return [Proposal("prune", view.slots[order], reason, score[order])] if len(order) else []


@dataclass(frozen=True)
class Merge:
    """Merges the most redundant pair of states into one.

    Args:
        above: Cosine of their bank rows from which on they say the same. (default: :obj:`0.98`)
    """

    above: float = 0.98

    def __call__(self, view: MemoryView) -> list[Proposal]:
        if view.slots.numel() < 2:
            return []
        rows = F.normalize(view.states, dim=1)
        cosine = rows @ rows.T
        cosine = cosine.masked_fill(torch.ones_like(cosine, dtype=torch.bool).triu(), -2.0)
        cosine = cosine.nan_to_num(-2.0)  # a state that is no number is like no other
        best = int(cosine.argmax())
        first, second = best % len(rows), best // len(rows)
        score = cosine[second, first]
        if score < self.above:
            return []
        pair = view.slots[[first, second]].view(1, 2)
        return [Proposal("merge", pair, f"cosine above {self.above:g}", score.view(1))]


@dataclass(frozen=True)
class Split:
    """Splits the busiest state in two.

    Args:
        above: From so many times the mean of its signal on. (default: :obj:`3.0`)
        signal: Which moving average. (default: :obj:`"routing"`)
    """

    above: float = 3.0
    signal: str = "routing"

    def __call__(self, view: MemoryView) -> list[Proposal]:
        score = _signal(view, self.signal)
        best = score.argmax().view(1)
        if view.num_free == 0 or not bool(score[best] > self.above * score.mean()):
            return []
        reason = f"{self.signal} above {self.above:g} of the mean"
        return [Proposal("split", view.slots[best], reason, score[best])]


@dataclass(frozen=True)
class Grow:
    """Allocates states while those that there are are all used.

    Args:
        above: Occupancy (:attr:`MemoryView.occupancy`) from which on. (default: :obj:`0.9`)
        count: How many at a time. (default: :obj:`1`)
    """

    above: float = 0.9
    count: int = 1

    def __call__(self, view: MemoryView) -> list[Proposal]:
        count, used = min(self.count, view.num_free), view.occupancy
        if count == 0 or used < self.above:
            return []
        reason = f"occupancy above {self.above:g}"
        return [Proposal("allocate", torch.tensor(count), reason, torch.tensor([used]))]


@dataclass(frozen=True)
class GrowTo:
    """A schedule: from each step on at least so many states.

    Args:
        schedule: Step -> number of states.
    """

    schedule: Mapping[int, int]

    def __call__(self, view: MemoryView) -> list[Proposal]:
        due = [count for step, count in self.schedule.items() if step <= view.step]
        count = min(max(due, default=0) - view.slots.numel(), view.num_free)
        return [Proposal("allocate", torch.tensor(count), "schedule")] if count > 0 else []


# When #############################################################################


class Every:
    """Asks another policy every so many steps.

    Args:
        steps: How many.
        policy: Whom to ask.
    """

    def __init__(self, steps: int, policy: Policy) -> None:
        if steps < 1:
            raise ValueError(f"steps must be positive, but is {steps}")
        self.steps, self.policy = steps, policy

    def __call__(self, view: MemoryView) -> list[Proposal]:
        return self.policy(view) if view.step % self.steps == 0 else []


class OnPlateau:
    """Asks another policy once the loss has stopped falling.

    Args:
        patience: Steps without a loss that is lower than the lowest before.
        policy: Whom to ask; after that the waiting begins anew.
        min_drop: How much lower counts. (default: :obj:`0.0`)
    """

    def __init__(self, patience: int, policy: Policy, min_drop: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience must be positive, but is {patience}")
        self.patience, self.policy, self.min_drop = patience, policy, min_drop
        self._lowest, self._waited = float("inf"), 0

    def __call__(self, view: MemoryView) -> list[Proposal]:
        if view.loss is None:
            raise ValueError("OnPlateau looks at the loss: call the editor's step(loss)")
        if view.loss < self._lowest - self.min_drop:
            self._lowest, self._waited = view.loss, 0
            return []
        self._waited += 1
        if self._waited < self.patience:
            return []
        is_number = view.loss == view.loss
        self._lowest, self._waited = view.loss if is_number else float("inf"), 0
        return self.policy(view)


def _signal(view: MemoryView, name: str) -> Tensor:
    if name not in view.signals:
        raise ValueError(
            f"the memory does not watch {name!r}, but {', '.join(view.signals)}; ask for it with "
            f"watch= of StateManager"
        )
    return view.signals[name]
