"""How far a run has come, and the learning rate and the hardness of gates there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nsm_graph.training.config import TrainConfig

#: Shares of a run between which gates harden: a task is learned before, and settles after.
HARDENING = (0.3, 0.8)


@dataclass(frozen=True)
class Schedule:
    """Warm-up and cosine over the steps of a run, over its seconds, or over steps with a limit in
    seconds.

    Args:
        config: The training section.
        steps_per_epoch: Batches in one pass.
    """

    config: TrainConfig
    steps_per_epoch: int

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, from 0 to 1.

        With both limits, seconds count only where the run is behind: they start at half time and
        from there run twice as fast. So a run that ends within its limit depends on its steps alone
        and can be repeated exactly.
        """
        done = 0.0
        if self.config.epochs is not None:
            done = step / (self.config.epochs * self.steps_per_epoch)
        if self.config.max_seconds is not None:
            spent = seconds / self.config.max_seconds
            done = max(done, spent if self.config.epochs is None else 2 * spent - 1)
        return min(done, 1.0)

    def rate(self, progress: float) -> float:
        """The learning rate at a given progress."""
        warmup = self.config.warmup
        if progress < warmup:
            # Never zero: a run of few steps would waste its first.
            return self.config.lr * max(progress / warmup, 0.01)
        start = max(warmup, self.config.hold)
        if progress < start:
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))

    @staticmethod
    def hardness(progress: float) -> float:
        """How far the stretch of gates has grown at a given progress, from 0 to 1."""
        start, end = HARDENING
        return min(max((progress - start) / (end - start), 0.0), 1.0)
