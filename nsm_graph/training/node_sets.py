"""What a run says of examples that have node sets of their own: their sizes, and their events."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning_fabric.wrappers import _FabricModule as Engine
from torch import Tensor
from torch_geometric.data import Batch, Data

from nsm_graph.data.tasks import SequenceTask
from nsm_graph.models.state import MachineState, NodeSetEvent
from nsm_graph.training.build import model_inputs
from nsm_graph.training.config import Config


@torch.no_grad()
def node_set_events(
    engine: Engine, config: Config, split: Sequence[Data], num_examples: int = 2
) -> list[NodeSetEvent]:
    """Who comes to the node sets of the first examples of a split, and who leaves them."""
    first = [split[i] for i in range(min(num_examples, len(split)))]
    if config.model.address_channels is None or not first:
        return []
    was_training = engine.training
    engine.eval()
    batch = Batch.from_data_list(first).to(engine.device)
    record = engine.run(**model_inputs(config.model, batch), record=True).record
    engine.train(was_training)
    return record.events


class NodeSetSizes:
    """How many states examples had in the end, and whether it is as many as they need."""

    def __init__(self) -> None:
        self.num_states: list[Tensor] = []
        self.needed: list[Tensor] = []

    def observe(
        self, state: MachineState | None, task: SequenceTask | None, x: Tensor | None
    ) -> None:
        """Takes note of a batch; nothing to note where examples share their node set.

        Args:
            state: In which the examples ended.
            task: What they are examples of, where that is a sequence task.
            x: Its symbols, ``[B, L, ...]``.
        """
        if state is None or state.nodes is None:
            return
        self.num_states.append(state.num_states)
        needed = None if task is None or x is None else task.needed_states(x.cpu())
        if needed is not None:
            self.needed.append(needed.to(state.num_states))

    def metrics(self) -> dict[str, float]:
        """Their mean, and the share of examples whose number is at most one off."""
        if not self.num_states:
            return {}
        num_states = torch.cat(self.num_states)
        result = {"num_states": float(num_states.double().mean())}
        if self.needed:
            error = (num_states - torch.cat(self.needed)).abs()
            result["states_within_one"] = float((error <= 1).double().mean())
        return result
