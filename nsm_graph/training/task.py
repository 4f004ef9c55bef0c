"""What is learned: loss, metrics, and which of two results is better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import Data

from nsm_graph.data.tasks import IGNORED


@dataclass(frozen=True)
class Task:
    """Loss and metrics of a task; targets of a regression are standardised for the loss only.

    Args:
        kind: classification, regression, token_classification or next_token.
        mean: regression: mean of the training targets, one per output.
        std: regression: their standard deviation.
    """

    kind: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, kind: str, train: Iterable[Data]) -> Task:
        """The task, with the scale of its targets measured on the training split."""
        if kind != "regression":
            return cls(kind)
        y = torch.cat([data.y.view(1, -1) for data in train]).double()
        std = y.std(dim=0, correction=0)
        std = torch.where(std > 0, std, 1.0)  # a constant target
        return cls(kind, tuple(y.mean(dim=0).tolist()), tuple(std.tolist()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """The task that a checkpoint was trained for."""
        return cls(values["kind"], tuple(values["mean"]), tuple(values["std"]))

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"kind": self.kind, "mean": list(self.mean), "std": list(self.std)}

    @property
    def metric(self) -> str:
        """The metric that tables show and that picks the best checkpoint."""
        return {"regression": "mae", "next_token": "loss"}.get(self.kind, "accuracy")

    def loss(self, out: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats, or the absolute error in standard deviations; a mean."""
        if self.kind == "regression":
            return self._error(out, y).mean()
        return F.cross_entropy(_full(out), y, label_smoothing=label_smoothing)

    def count(self, out: Tensor, y: Tensor, batch: Tensor, size: int) -> Tensor:
        """Sums over a batch: loss, hits (or error), targets, wholly right sequences, sequences.

        Args:
            out: One prediction for each target.
            y: The targets.
            batch: The example of each target; not looked at where examples have one target each.
            size: Number of examples.
        """
        if self.kind == "regression":
            error = self._error(out, y)
            in_unit = error * error.new_tensor(self.std)
            sums: list[Any] = [error.sum(), in_unit.sum(), error.numel(), 0, 0]
        else:
            is_scored = y != IGNORED
            is_wrong = (out.argmax(dim=-1) != y) & is_scored
            loss = F.cross_entropy(_full(out), y, reduction="sum")
            num_scored = is_scored.sum()
            # For one label an example, `batch` has another length than `y`.
            flawed = batch[is_wrong].unique().numel() if self.kind == "token_classification" else 0
            sums = [loss, num_scored - is_wrong.sum(), num_scored, size - flawed, size]
        return torch.tensor([float(value) for value in sums], dtype=torch.double)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Means from the sums of `count`; empty if nothing was counted."""
        loss, hits, targets, whole, sequences = sums.tolist()
        if targets == 0:
            return {}
        result = {"loss": loss / targets}
        if self.kind == "regression":
            return result | {"mae": hits / targets}
        result["accuracy"] = hits / targets
        if self.kind == "next_token":
            result["bits_per_token"] = loss / targets / math.log(2)
        elif self.kind == "token_classification":
            result["full_sequence_accuracy"] = whole / sequences
        return result

    def score(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Larger is better; the loss breaks ties."""
        best_high = self.metric == "accuracy"
        return (metrics[self.metric] if best_high else -metrics[self.metric], -metrics["loss"])

    def _error(self, out: Tensor, y: Tensor) -> Tensor:
        out = _full(out)
        mean, std = out.new_tensor(self.mean), out.new_tensor(self.std)
        return (out - (y.view_as(out) - mean) / std).abs()


def _full(out: Tensor) -> Tensor:
    # A sum of half-precision losses would lose digits.
    return out.to(torch.promote_types(out.dtype, torch.float))
