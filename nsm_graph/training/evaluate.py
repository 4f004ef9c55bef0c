"""Predictions of a model and its metrics on a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning_fabric.wrappers import _FabricModule as Engine
from torch import Tensor
from torch_geometric.data import Data

from nsm_graph.data import DatasetInfo, TaskSequences
from nsm_graph.data.tasks import IGNORED
from nsm_graph.models.state import MachineState
from nsm_graph.training.batches import batches
from nsm_graph.training.build import model_inputs
from nsm_graph.training.config import Config
from nsm_graph.training.node_sets import NodeSetSizes
from nsm_graph.training.task import Task


class Predicted(NamedTuple):
    """A prediction beside what it is compared with; only tokens that have a label are asked."""

    out: Tensor
    y: Tensor
    batch: Tensor  #: the example of each target
    state: Any  #: to carry on with (text only), detached
    node_sets: MachineState | None = None  #: where examples have node sets of their own


def predict(
    engine: Engine,
    config: Config,
    task: Task,
    batch: Data,
    state: Any,
    segment_length: int | None = None,
) -> Predicted:
    """The prediction for a batch."""
    inputs = model_inputs(config.model, batch)
    if segment_length is not None:
        inputs["segment_length"] = segment_length
    if task.kind == "next_token":
        output = engine.run(**inputs, state=state)
        state = None if output.state is None else output.state.detach()
        node_sets = None if config.model.address_channels is None else output.state
        return Predicted(output.out, batch.y, batch.batch, state, node_sets)
    y, example = batch.y, batch.batch
    if task.kind == "token_classification":
        asked = (y != IGNORED).nonzero().flatten()
        if asked.numel() < y.numel():
            inputs["at"], y, example = asked, y[asked], example[asked]
    if config.model.address_channels is None:
        return Predicted(engine(**inputs), y, example, None)
    output = engine.run(**inputs)
    return Predicted(output.out, y, example, None, output.state)


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
    sizes = NodeSetSizes()
    sequences = split.task if isinstance(split, TaskSequences) else None
    for batch in batches(config, info, split):
        batch = batch.to(engine.device)
        predicted = predict(engine, config, task, batch, state, segment_length)
        state = predicted.state
        sums += task.count(predicted.out, predicted.y, predicted.batch, batch.num_graphs)
        x = batch.x.unflatten(0, (batch.num_graphs, -1)) if sequences is not None else None
        sizes.observe(predicted.node_sets, sequences, x)
    engine.train(was_training)
    return task.metrics(sums) | sizes.metrics()
