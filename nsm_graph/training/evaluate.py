"""Predictions of a model and its metrics on a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric.wrappers import _FabricModule as Engine
from torch import Tensor
from torch_geometric.data import Data

from nsm_graph.data import DatasetInfo
from nsm_graph.training.batches import batches
from nsm_graph.training.build import model_inputs
from nsm_graph.training.config import Config
from nsm_graph.training.task import Task


def predict(
    engine: Engine,
    config: Config,
    task: Task,
    batch: Data,
    state: Any,
    segment_length: int | None = None,
) -> tuple[Tensor, Any]:
    """The prediction for a batch; for text also the states, detached, to carry on with."""
    inputs = model_inputs(config.model, batch)
    if segment_length is not None:
        inputs["segment_length"] = segment_length
    if task.kind != "next_token":
        return engine(**inputs), None
    output = engine.run(**inputs, state=state)
    return output.out, None if output.state is None else output.state.detach()


@torch.no_grad()
def evaluate(
    engine: Engine,
    config: Config,
    task: Task,
    split: Sequence[Data],
    info: DatasetInfo,
    segment_length: int | None = None,
) -> dict[str, float]:
    """Metrics over a split, read in order; empty for an empty split."""
    if len(split) == 0:
        return {}
    was_training = engine.training
    engine.eval()
    sums, state = torch.zeros(5, dtype=torch.double), None
    for batch in batches(config, info, split):
        batch = batch.to(engine.device)
        out, state = predict(engine, config, task, batch, state, segment_length)
        sums += task.count(out, batch.y, batch.batch)
    engine.train(was_training)
    return task.metrics(sums)
