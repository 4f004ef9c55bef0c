"""The machine on PyG's ``HeteroData``: node types ``token`` and ``state``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from nsm_graph.models.state import MachineState, Record

if TYPE_CHECKING:
    from nsm_graph.models.machine import NeuralStateMachine


def read(machine: NeuralStateMachine, data: HeteroData) -> HeteroData:
    r"""Reads a :class:`~torch_geometric.data.HeteroData` and gives a copy back.

    Reads ``data["token"].x`` (with ``batch`` and ``pe`` where they exist) and, for a convolution,
    the edges of some type ``("token", ..., "token")``. In the copy ``data["state"]`` holds ``x``,
    ``batch`` and ``slot``, the edge type ``("token", "routes", "state")`` holds ``edge_index`` and
    ``weight`` of the routing (of every segment; of the last pass over a graph), ``data["token"].y``
    stays, ``data["token"].read`` holds per-token read-outs where there are any, and ``data.out``
    the prediction.
    """
    if "token" not in data.node_types or "x" not in data["token"]:
        raise ValueError(
            f'expected a node type "token" with x, but data has node types {data.node_types}'
        )
    token = data["token"]
    edge_index = edge_attr = None
    # A machine that reads sequences has no use for edges among tokens.
    among = [edge for edge in data.edge_types if edge[0] == edge[2] == "token"]
    if machine.segment_length is None and among:
        if len(among) > 1:
            raise ValueError(
                f"expected one edge type among tokens, but data has {among}; keep the one that the "
                f"convolution shall read"
            )
        edge_index = data[among[0]].edge_index
        edge_attr = data[among[0]].get("edge_attr")
    batch = token.get("batch")
    result = machine.run(
        token.x,
        batch,
        batch_size=token.ptr.numel() - 1 if "ptr" in token else None,
        edge_index=edge_index,
        edge_attr=edge_attr,
        pe=token.get("pe"),
        record=True,
    )
    assert result.record is not None
    out = data.clone()
    out["state"].x = result.state.states
    nodes = result.state.rows
    out["state"].batch, out["state"].ptr = nodes.batch, nodes.ptr
    out["state"].slot = result.state.row_slots
    out.out = result.out
    if result.tokens is not None:
        out["token"].read = result.tokens
    is_graph = machine.segment_length is None
    steps = slice(-1, None) if is_graph else slice(None)
    routes = _routes(result.record, result.state, machine.manager.max_states, steps)
    if routes is not None:
        store = out["token", "routes", "state"]
        store.edge_index, store.weight = routes
    return out


def _routes(
    record: Record, state: MachineState, num_slots: int, steps: slice
) -> tuple[Tensor, Tensor] | None:
    """Edges and weights of the routing in the numbering of the input, step by step.

    A state is named by its example and slot; edges to slots that are empty in the end are left out.
    """
    row = torch.full((state.num_examples * num_slots,), -1, device=state.slots.device)
    nodes = state.rows
    row[nodes.batch * num_slots + state.row_slots] = torch.arange(nodes.num_rows, device=row.device)
    slots_of = record.slots or [
        state.slots.repeat(examples.numel()) for examples in record.examples
    ]
    edges, weights = [], []
    for relation, weight, tokens, examples, slots in zip(
        record.relations[steps],
        record.routing[steps],
        record.tokens[steps],
        record.examples[steps],
        slots_of[steps],
        strict=True,
    ):
        if weight is None:
            return None
        src, dst = relation.edge_index
        place = examples[relation.targets.batch] * num_slots + slots
        target = row[place][dst]
        is_there = target >= 0
        edges.append(torch.stack([tokens[src], target])[:, is_there])
        weights.append(weight[is_there])
    return (torch.cat(edges, 1), torch.cat(weights)) if edges else None
