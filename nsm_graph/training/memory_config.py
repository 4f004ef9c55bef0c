"""How the node set changes in the course of a training."""

from __future__ import annotations

from dataclasses import dataclass

from nsm_graph.memory import (
    Every,
    Grow,
    MemoryEditor,
    Merge,
    OnPlateau,
    Prune,
    Split,
    StateManager,
)  # fmt: skip
from nsm_graph.memory.policy import Policy
from nsm_graph.training.checks import check_choice, check_range, check_types

RULES = ("prune_below", "merge_above", "split_above", "grow_above", "plateau")
SIGNALS = ("routing", "gradient", "update", "sharpness")
#: Horizon of every signal's moving average, in steps.
HORIZON = 100


@dataclass(kw_only=True)
class MemoryConfig:
    """When states are added and removed, which ones, and how many stay.

    Args:
        every: nsm: steps between two looks at the memory; never if not given.
        prune_below: Remove states whose signal is less than this share of the mean.
        merge_above: Merge the two most alike states from this cosine of their bank rows on.
        split_above: Split the busiest state from so many times the mean of the signal on.
        grow_above: Add a state while the occupancy, the effective number of states over their
            number, is at least this.
        signal: Which signal pruning and splitting look at: routing (mass), gradient, update or
            sharpness (of attention).
        plateau: Add a state when the training loss has not fallen for so many looks.
        min_states: Never fewer states.
        max_states: Never more; as many as there are slots if not given.
        protect: Steps in which a new state is neither pruned nor merged.
        cool_down: Steps after an edit in which there is no other.
        state_cost: What the training loss is charged for every state that stays in an example,
            where examples have node sets of their own; grows from nothing between 30 and 80 % of
            the run: what a memory is good for is learned before it is saved.
    """

    every: int | None = None
    prune_below: float | None = None
    merge_above: float | None = None
    split_above: float | None = None
    grow_above: float | None = None
    signal: str = "routing"
    plateau: int | None = None
    min_states: int = 1
    max_states: int | None = None
    protect: int = 0
    cool_down: int = 0
    state_cost: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "memory.")
        check_range("memory.every", self.every, 1)
        check_range("memory.prune_below", self.prune_below, 0, above=True)
        check_range("memory.merge_above", self.merge_above, -1, 1)
        check_range("memory.split_above", self.split_above, 1)
        check_range("memory.grow_above", self.grow_above, 0, 1)
        check_choice("memory.signal", self.signal, SIGNALS)
        check_range("memory.plateau", self.plateau, 1)
        check_range("memory.min_states", self.min_states, 1)
        check_range("memory.max_states", self.max_states, self.min_states)
        check_range("memory.protect", self.protect, 0)
        check_range("memory.cool_down", self.cool_down, 0)
        check_range("memory.state_cost", self.state_cost, 0)
        rules = [key for key in RULES if getattr(self, key) is not None]
        if (self.every is None) != (not rules):
            raise ValueError(
                f"memory.every: expected together with one of {', '.join(RULES)}; got "
                f"memory.every={self.every} and {', '.join(rules) or 'none of them'}"
            )

    @property
    def watch(self) -> dict[str, float] | None:
        """What the machine is to watch beside the routing mass."""
        return None if self.signal == "routing" else {self.signal: HORIZON}

    @property
    def grows(self) -> bool:
        """Whether a rule would add states."""
        return any(x is not None for x in (self.split_above, self.grow_above, self.plateau))

    @property
    def is_given(self) -> bool:
        return self.every is not None

    def editor(self, manager: StateManager, seed: int) -> MemoryEditor:
        """An editor for these states."""
        policies: list[Policy] = []
        if self.prune_below is not None:
            policies.append(Prune(below=self.prune_below, signal=self.signal))
        if self.merge_above is not None:
            policies.append(Merge(self.merge_above))
        if self.split_above is not None:
            policies.append(Split(self.split_above, self.signal))
        if self.grow_above is not None:
            policies.append(Grow(self.grow_above))
        if self.plateau is not None:
            policies.append(OnPlateau(self.plateau, Grow(0.0)))
        policies = [Every(self.every or 1, policy) for policy in policies]
        return MemoryEditor(
            manager, *policies, min_states=max(self.min_states, manager.min_states),
            max_states=self.max_states, protect=self.protect, cool_down=self.cool_down, seed=seed,
        )  # fmt: skip
