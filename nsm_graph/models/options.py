"""What a machine refuses: options that contradict each other, inputs that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nsm_graph.models.embedding import check_finite
from nsm_graph.models.heads import HEADS
from nsm_graph.models.state import MachineState
from nsm_graph.nn import LearnedPosition, StateAllocator
from nsm_graph.nn.checks import check_choice
from nsm_graph.nn.positional import SEQUENCE_POSITIONS
from nsm_graph.partition import ptr_from_batch

SCAN_PARTS = ("convolve", "hoist", "advance", "gated_channels", "gated_dropout")

if TYPE_CHECKING:
    from nsm_graph.models.machine import NeuralStateMachine


def check_options(
    *,
    in_channels: int,
    segment_length: int | None,
    num_steps: int | None,
    head: str,
    position: str | None,
    scan: nn.Module | None,
    allocator: StateAllocator | None,
    mix: str,
    watch: Mapping[str, float] | None,
    initial_states: int,
    num_states: int,
    ordered_nodes: bool,
    conv: object,
    edge_embeddings: int | None,
    edge_channels: int | None,
    pe_channels: int | None,
    dropout: float,
    bptt_segments: int | None,
    checkpoint_segments: int | str | None,
    **sizes: int,
) -> None:
    """Raises a ``ValueError`` unless the constructor's options fit together."""
    counts: dict[str, object] = {
        **sizes,
        "segment_length": segment_length,
        "num_steps": num_steps,
        "bptt_segments": bptt_segments,
        "edge_embeddings": edge_embeddings,
        "edge_channels": edge_channels,
        "pe_channels": pe_channels,
    }
    if checkpoint_segments != "sqrt":
        counts["checkpoint_segments"] = checkpoint_segments
    for name, value in counts.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not is_integer or value < 1):
            raise ValueError(f"{name} must be a positive integer, but is {value!r}")
    if in_channels < 1 and in_channels != -1:
        raise ValueError(f"in_channels must be positive or -1 (inferred), but is {in_channels}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), but is {dropout}")
    check_choice("head", head, HEADS)
    check_choice("position", position, SEQUENCE_POSITIONS)
    if edge_embeddings is not None and edge_channels is not None:
        raise ValueError("edge_embeddings (symbols) and edge_channels (features) exclude another")
    if "sharpness" in (watch or {}) and mix == "routing":
        raise ValueError('watch: "sharpness" is that of the attention, but mix="routing" has none')
    if allocator is not None:
        _check_allocator(allocator, segment_length, scan, mix, watch, initial_states, **sizes)
    if segment_length is None:
        _check_graph_options(
            head, position, scan if not ordered_nodes else None, bptt_segments, checkpoint_segments
        )
        if scan is not None:
            _check_scan(scan, num_states=num_states, **sizes)
        if conv is None and (edge_embeddings or edge_channels):
            raise ValueError("edge_embeddings and edge_channels are for conv=, which is None")
        return
    if scan is not None:
        _check_scan(scan, num_states=num_states, **sizes)
    for_graphs = {
        "ordered_nodes": ordered_nodes or None,
        "num_steps": num_steps,
        "conv": conv,
        "pe_channels": pe_channels,
        "edge_embeddings": edge_embeddings,
        "edge_channels": edge_channels,
    }
    for name, value in for_graphs.items():
        if value is not None:
            raise ValueError(
                f"{name} is for graphs, but segment_length={segment_length} asks for sequences; "
                f"use segment_length=None"
            )


def _check_scan(scan: nn.Module, **sizes: int) -> None:
    lacking = [name for name in SCAN_PARTS if not hasattr(scan, name)]
    if lacking:
        raise ValueError(
            f"scan must be an nn.SegmentScan, a module with what nsm_graph.models.cell.Scan lists, "
            f"or None, but {type(scan).__name__} has no {', '.join(lacking)}"
        )
    for name in ("token_channels", "state_channels", "num_states"):
        built = getattr(scan, name, sizes[name])
        if built != sizes[name]:
            slots = " (max_states)" if name == "num_states" else ""
            raise ValueError(
                f"scan was built with {name}={built}, but the machine has {sizes[name]}{slots}; "
                f"build it with {name}={sizes[name]}"
            )


def _check_allocator(
    allocator: StateAllocator,
    segment_length: int | None,
    scan: nn.Module | None,
    mix: str,
    watch: Mapping[str, float] | None,
    initial_states: int,
    **sizes: int,
) -> None:
    if not isinstance(allocator, StateAllocator):
        raise ValueError(
            f"allocator must be an nn.StateAllocator or None, but is {type(allocator).__name__}"
        )
    for name in ("token_channels", "state_channels"):
        built = getattr(allocator, name)
        if built not in (sizes[name], -1):
            raise ValueError(
                f"allocator was built with {name}={built}, but the machine has {sizes[name]}; "
                f"build it with {name}={sizes[name]}"
            )
    if segment_length is None:
        raise ValueError(
            "allocator asks tokens in order, but the nodes of a graph have none; use it on "
            "sequences, with a segment_length"
        )
    if scan is not None:
        raise ValueError(
            "allocator and scan both own the first channels of a state; leave one of them out"
        )
    if mix == "attention":
        raise ValueError('allocator acts in the router, but mix="attention" has none')
    if allocator.budget is not None and allocator.budget < initial_states:
        raise ValueError(
            f"budget={allocator.budget:g} states cannot be met: every example starts with "
            f"num_states={initial_states}"
        )
    if "update" in (watch or {}):
        raise ValueError(
            'watch: "update" compares the states before and after a call, but with an allocator '
            "these are not the same ones; leave it out"
        )


def _check_graph_options(
    head: str,
    position: str | None,
    scan: object,
    bptt_segments: int | None,
    checkpoint_segments: int | str | None,
) -> None:
    if position is not None:
        raise ValueError(
            f"position={position!r} is for sequences, but segment_length=None asks for graphs; use "
            f"pe_channels for a graph's positional encoding"
        )
    if scan is not None:
        raise ValueError(
            "scan needs ordered tokens, but the nodes of a graph have no order; say "
            "ordered_nodes=True if the rows of each graph stand in a meaningful one"
        )
    if head == "next_token":
        raise ValueError('head="next_token" needs ordered tokens; use "token" on graphs')
    for name, value in (
        ("bptt_segments", bptt_segments),
        ("checkpoint_segments", checkpoint_segments),
    ):
        if value is not None:
            raise ValueError(f"{name} is for sequences, but segment_length=None asks for graphs")


def check_input(
    machine: NeuralStateMachine,
    x: Tensor,
    batch: Tensor | None,
    batch_size: int | None,
    state: MachineState | None,
    edge_index: Tensor | None,
    edge_attr: Tensor | None,
    pe: Tensor | None,
    segment_length: int | None,
) -> Tensor:
    """Raises a ``ValueError`` unless a call's arguments fit; returns the examples' ``ptr``."""
    parameter = machine.manager.bank
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor, but is {type(x).__name__}")
    if state is not None and not isinstance(state, MachineState):
        raise ValueError(
            f"state must be a MachineState, as run(...).state is, but is {type(state).__name__}"
        )
    tensors = {"x": x, "batch": batch, "edge_index": edge_index, "edge_attr": edge_attr, "pe": pe}
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, but is {type(tensor).__name__}")
        if tensor is not None and tensor.device != parameter.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but the machine is on {parameter.device}; move one"
            )
    machine.embedding.check(x)
    is_autocast = torch.is_autocast_enabled(x.device.type)
    if x.is_floating_point() and x.dtype != parameter.dtype and not is_autocast:
        raise ValueError(
            f"x has dtype {x.dtype}, but the machine has {parameter.dtype}; use x.to(...) or "
            f"machine.to(...)"
        )
    if state is not None:
        _check_state(machine, state, batch_size)
        batch_size = state.num_examples
    ptr = check_batch(x, batch, batch_size)
    _check_segment_length(machine, segment_length)
    _check_graph_input(machine, x, edge_index, edge_attr, pe)
    return ptr


def check_batch(x: Tensor, batch: Tensor | None, batch_size: int | None) -> Tensor:
    """The examples' ``ptr`` from PyG's ``batch``, or a ``ValueError``."""
    if batch is None:
        if batch_size not in (None, 1):
            raise ValueError(f"{batch_size} examples need batch=, which says whose each token is")
        if x.size(0) == 0 and batch_size is None:
            raise ValueError("the batch is empty: x has no rows; pass at least one token")
        return torch.tensor([0, x.size(0)], device=x.device)
    if batch.dim() != 1 or batch.size(0) != x.size(0):
        raise ValueError(
            f"batch must have one entry per row of x, {x.size(0)}, but has shape "
            f"{tuple(batch.shape)}"
        )
    if batch_size is None:
        if batch.numel() == 0:
            raise ValueError("the batch is empty: x has no rows; pass at least one token")
        batch_size = int(batch[-1]) + 1
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, but is {batch_size}")
    return ptr_from_batch(batch, batch_size)


def check_at(at: Tensor | None, num_tokens: int, has_token_head: bool) -> None:
    """Raises unless ``at`` names tokens, and there is something to predict for each."""
    if at is None:
        return
    if not has_token_head:
        raise ValueError('at= names tokens, but head="example" predicts for examples; leave it out')
    if not isinstance(at, Tensor):
        raise ValueError(f"at must be a tensor of token numbers, but is {type(at).__name__}")
    if at.dim() != 1 or at.is_floating_point() or at.dtype == torch.bool:
        raise ValueError(
            f"at must hold the numbers of tokens, integers (P,), but has shape {tuple(at.shape)} "
            f"and dtype {at.dtype}; use mask.nonzero().flatten() for a mask"
        )
    if at.numel() > 0 and (int(at.min()) < 0 or int(at.max()) >= num_tokens):
        raise ValueError(
            f"at names tokens {int(at.min())} to {int(at.max())}, but x has {num_tokens} rows"
        )


def _check_state(machine: NeuralStateMachine, state: MachineState, batch_size: int | None) -> None:
    slots = machine.manager.slots
    if batch_size not in (None, state.num_examples):
        raise ValueError(
            f"batch_size is {batch_size}, but state carries {state.num_examples} examples; carry "
            f"a state between batches of the same streams only"
        )
    if state.states.device != slots.device:
        raise ValueError(
            f"state is on {state.states.device}, but the machine is on {slots.device}; use "
            f"state.to(...)"
        )
    if state.states.dtype != machine.manager.bank.dtype and not torch.is_autocast_enabled(
        state.states.device.type
    ):
        raise ValueError(
            f"state has dtype {state.states.dtype}, but the machine has "
            f"{machine.manager.bank.dtype}; carry it in the machine's precision"
        )
    if (machine.cell.allocator is None) != (state.nodes is None):
        carries = "one node set for all examples" if state.nodes is None else "a node set for each"
        has = "no allocator" if state.nodes is not None else "an allocator"
        raise ValueError(
            f"state carries {carries}, but this machine has {has}; it comes from another machine"
        )
    if state.nodes is not None:
        _check_node_sets(machine, state)
    elif not torch.equal(state.slots, slots):
        raise ValueError(
            f"state was carried from slots {state.slots.tolist()}, but now {slots.tolist()} are "
            f"active; take it along with state.edit(edit, machine.manager)"
        )
    shape = (state.rows.num_rows, machine.state_channels)
    if state.states.shape != shape:
        raise ValueError(
            f"state must hold states of shape {shape}, but has {tuple(state.states.shape)}; it "
            f"comes from another machine"
        )
    cell = None if state.cell is None else tuple(state.cell.shape)
    wanted = None
    if machine.cell.propagator.cell == "lstm":
        wanted = (shape[0], machine.state_channels - machine.cell.kept_channels)
    if cell != wanted:
        raise ValueError(
            f"state must hold {_of_shape('cell', wanted)}, but holds {_of_shape('cell', cell)}; it "
            f"comes from another machine"
        )
    tail = (state.num_examples, machine.token_channels)
    if state.tail is not None and (machine.cell.scan is None or state.tail.shape != tail):
        raise ValueError(
            f"state carries a tail of shape {tuple(state.tail.shape)}, but this machine "
            f"{'has no scan' if machine.cell.scan is None else f'needs {tail}'}; it comes from "
            f"another machine"
        )


def _check_node_sets(machine: NeuralStateMachine, state: MachineState) -> None:
    nodes, num_slots = state.rows, machine.manager.max_states
    for name in ("slots", "log_presence", "log_lasting"):
        rows = getattr(state, name)
        if rows is None or rows.shape != (nodes.num_rows,):
            shape = None if rows is None else tuple(rows.shape)
            raise ValueError(
                f"state must hold one entry of {name} for each of its {nodes.num_rows} states, but "
                f"has {shape}"
            )
    if nodes.num_examples != state.num_examples:
        raise ValueError(
            f"state.nodes has {nodes.num_examples} examples, but num_tokens {state.num_examples}"
        )
    place = nodes.batch * num_slots + state.slots
    is_slot = (state.slots >= 0) & (state.slots < num_slots)
    if not bool(is_slot.all()) or bool((place.diff() <= 0).any()):
        raise ValueError(
            f"state.slots must ascend in 0..{num_slots - 1} within each example, but are "
            f"{state.slots.tolist()}"
        )


def _of_shape(name: str, shape: tuple[int, ...] | None) -> str:
    return f"no {name}" if shape is None else f"a {name} of shape {shape}"


def _check_segment_length(machine: NeuralStateMachine, segment_length: int | None) -> None:
    if segment_length is None:
        return
    if machine.segment_length is None:
        raise ValueError("segment_length was given, but this machine reads whole graphs")
    if not isinstance(segment_length, int) or segment_length < 1:
        raise ValueError(f"segment_length must be a positive integer, but is {segment_length!r}")
    has_table = isinstance(machine.position, LearnedPosition) or machine.cell.relative is not None
    if has_table and segment_length > machine.segment_length:
        raise ValueError(
            f"segment_length {segment_length} is longer than the {machine.segment_length} places "
            f'this machine has learned; build it longer, or with position="sinusoidal"'
        )


def _check_graph_input(
    machine: NeuralStateMachine,
    x: Tensor,
    edge_index: Tensor | None,
    edge_attr: Tensor | None,
    pe: Tensor | None,
) -> None:
    if machine.segment_length is not None:
        for name, value in (("edge_index", edge_index), ("edge_attr", edge_attr), ("pe", pe)):
            if value is not None:
                raise ValueError(
                    f"{name} was given, but this machine reads sequences; build it with "
                    f"segment_length=None for graphs"
                )
        return
    if (machine.graph_position is None) != (pe is None):
        needed = "needs" if pe is None else "was not built for"
        raise ValueError(f"the machine {needed} pe; pe_channels in the constructor decides")
    if pe is not None:
        check_finite(pe, "pe")
    if machine.passes is not None and edge_index is None:
        raise ValueError("the machine has a conv, which needs edge_index")
    if edge_attr is not None and edge_index is None:
        raise ValueError("edge_attr was given without edge_index")
    if edge_index is not None:
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.is_floating_point():
            raise ValueError(
                f"edge_index must be integer of shape (2, E), but has {tuple(edge_index.shape)} "
                f"and dtype {edge_index.dtype}"
            )
        if edge_index.numel() > 0:
            least, most = torch.stack(edge_index.aminmax()).tolist()
            if least < 0 or most >= x.size(0):
                raise ValueError(
                    f"edge_index names node {least if least < 0 else most}, but x has {x.size(0)} "
                    f"rows"
                )
    if edge_attr is not None:
        if edge_attr.dim() == 0 or edge_attr.size(0) != edge_index.size(1):
            raise ValueError(
                f"edge_attr must have one row per edge, {edge_index.size(1)}, but has shape "
                f"{tuple(edge_attr.shape)}"
            )
        if machine.edge_embedding is not None:
            machine.edge_embedding.check(edge_attr)
