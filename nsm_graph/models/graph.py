"""Passes over graphs: all nodes of a graph are its tokens, read several times.

Between passes the nodes may talk along the edges of the graph (any PyG convolution) and read the
memory back, so that what one node wrote reaches every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.state import MachineState, Reading, Record
from nsm_graph.nn import TokenReadout
from nsm_graph.nn.edge_attention_layer import hide_from_explainers
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


class GraphPasses(nn.Module):
    r"""What happens to the nodes around each reading pass.

    .. math::
        x &\leftarrow \mathrm{LayerNorm}(x + \mathrm{ReLU}(\mathrm{conv}_k(x, \text{edges})))
        \quad \text{before pass } k \\
        x &\leftarrow \mathrm{LayerNorm}(x + \mathrm{read}(x, s))
        \quad \text{after pass } k

    Args:
        channels: Size of each token.
        state_channels: Size of each state.
        heads: Number of heads of the read-out.
        num_steps: Number of passes K.
        conv: One convolution for all passes, or one for each, from ``channels`` to ``channels``.
        dropout: Dropout of the convolution's output.
    """

    def __init__(
        self,
        channels: int,
        state_channels: int,
        heads: int,
        num_steps: int,
        conv: nn.Module | Sequence[nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        is_one = isinstance(conv, nn.Module) and not isinstance(conv, nn.ModuleList)
        convs = [conv] if is_one else list(conv)
        if len(convs) not in (1, num_steps):
            raise ValueError(
                f"conv must be one module or one for each of the {num_steps} passes, but "
                f"{len(convs)} were given"
            )
        self.convs = nn.ModuleList(convs)
        self.dropout = nn.Dropout(dropout)
        self.conv_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(num_steps))
        # After the last pass nobody looks at the nodes again, unless a token head does, and that
        # reads for itself.
        self.read_norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(num_steps - 1))
        self.readout = TokenReadout(channels, state_channels, heads) if num_steps > 1 else None
        hide_from_explainers(self.readout)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def talk(self, step: int, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None) -> Tensor:
        """One exchange along the edges of the graph."""
        conv = self.convs[step if len(self.convs) > 1 else 0]
        if edge_attr is None:
            message = conv(x, edge_index)
        else:
            message = conv(x, edge_index, edge_attr=edge_attr)
        if message.shape != x.shape:
            raise ValueError(
                f"conv must map {x.size(1)} channels to {x.size(1)}, but gave "
                f"{tuple(message.shape)} for {tuple(x.shape)}"
            )
        return self.conv_norms[step](x + self.dropout(F.relu(message)))

    def read(self, step: int, x: Tensor, states: Tensor, relation: Relation) -> Tensor:
        """Gives the nodes their memory back, except after the last pass."""
        if step >= len(self.read_norms):
            return x
        assert self.readout is not None
        return self.read_norms[step](x + self.readout((states, x), relation))


def read_passes(
    cell: StateMachineCell,
    passes: GraphPasses | None,
    tokens: Tensor,
    nodes: Partition,
    state: MachineState,
    importance: Tensor,
    *,
    num_steps: int,
    scan_reads: bool,
    edge_index: Tensor | None,
    edge_attr: Tensor | None,
    record: Record | None,
) -> Reading:
    """Reads all nodes of every graph in each of ``num_steps`` passes.

    Args:
        cell: Reads one pass.
        passes: What the nodes do between passes; without it tokens stay and are hoisted once.
        tokens: Embedded nodes, ``[T, C_t]``.
        nodes: How they fall into graphs.
        state: The memory before.
        importance: Learnable importance of every slot.
        num_steps: Number of passes.
        scan_reads: Whether nodes are to read from the scan.
        edge_index: Edges of the graphs, for ``passes``.
        edge_attr: Their embedded features.
        record: To be filled, where given.
    """
    rows = Partition.uniform(state.num_examples, state.slots.numel(), tokens.device)
    relation = Relation.between(nodes, rows)
    place = tokens.new_zeros(tokens.size(0), dtype=torch.long)
    states, cell_states, before = state.states, state.cell, state.states
    for step in range(num_steps):
        if passes is not None:
            tokens = passes.talk(step, tokens, edge_index, edge_attr)
        if passes is not None or step == 0:
            ordered = None if cell.scan is None else cell.scan.convolve(tokens, nodes, None)
            hoisted, weights = cell.hoist(
                *(tokens, place, relation, importance, state.slots),
                scan_tokens=ordered,
                scan_reads=scan_reads,
            )
            (inputs,) = cell.connect([hoisted], state.slots)
        if inputs.nodes is not None:
            inputs = inputs._replace(nodes=replace(inputs.nodes, step=step))
        before = states
        output = cell(states, cell_states, inputs, record is not None)
        states, cell_states = output.states, output.propagated.cell
        if record is not None:
            record.examples.append(torch.arange(state.num_examples, device=tokens.device))
            record.tokens.append(torch.arange(tokens.size(0), device=tokens.device))
            record.relations.append(inputs.relation)
            record.routing.append(weights)
            record.attention.append(output.attention)
            record.gates.append(output.propagated.gates)
            record.states.append(states)
            record.topologies.append(output.talks)
        if passes is not None:
            tokens = passes.read(step, tokens, states, relation.reverse())
    num_read = state.num_tokens + nodes.ptr.diff()
    return Reading(
        state=MachineState(states, cell_states, num_read, state.slots),
        tokens=tokens,
        token_order=None,
        relation=relation,
        before=[before],
        after=[states],
        reads=None if output.reads is None else nodes.unpad(output.reads),
        mass=cell.routing_mass(weights, hoisted.relation),
    )
