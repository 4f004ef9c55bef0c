"""The whole loop over segments as one operation, where the cell is the documented one.

The same numbers as `loop.py`, up to rounding. What the operation does not know goes step by step,
and the log named ``nsm_graph`` says why, once.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import SumAggregation as _Aggregation
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.models.cell import SegmentInputs, StateMachineCell
from nsm_graph.models.loop import Trace
from nsm_graph.models.segments import SegmentPlan
from nsm_graph.nn import HybridAttention, StateCommunication, StatePropagator
from nsm_graph.nn.edge_attention_layer import is_watched
from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, segment_loop
from nsm_graph.topology.base import Complete

logger = logging.getLogger("nsm_graph")
_said: set[str] = set()


def why_not_fused(
    cell: StateMachineCell, states: Tensor, hoisted: SegmentInputs, *, record: bool = False,
    bptt_segments: int | None = None,
) -> str | None:  # fmt: skip
    """Why the loop has to go step by step; None where it need not."""
    if not cell.fuse:
        return "cell.fuse is False"
    if states.device.type != "cpu":
        return f"there is no kernel for {states.device.type}"
    if states.dtype != torch.float32:
        return f"{states.dtype} asks for the reference"
    if torch.compiler.is_compiling() or cell._compiled_call_impl is not None:
        return "the cell is compiled"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform has to see every operation"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the type of every operation"
    if cell.scan is not None or cell.snap is not None:
        return "a scan or a snap acts in every step"
    if cell.mix != "sum" or hoisted.bias is not None:
        return "attention has a bias, or routing and attention are not added"
    if not hoisted.relation.is_complete or hoisted.mask is not None:
        return "not every token has an edge to every state"
    if cell.propagator.cell != "gru":
        return "the gates are an LSTM's"
    if cell.topology is not None and type(cell.topology) is not Complete:
        return f"states talk along {cell.topology!r}"
    if record or bptt_segments is not None:
        return "steps are recorded, or the history is cut"
    if not _is_plain(cell):
        return "a part of the cell was replaced, or a hook watches it"
    return None


def read_fused(
    cell: StateMachineCell,
    states: Tensor,
    hoisted: SegmentInputs,
    plan: SegmentPlan,
    keep: bool,
) -> Trace:
    """What :func:`nsm_graph.models.loop.read_segments` does."""
    num_active = torch.tensor([step.num_examples for step in plan.steps], dtype=torch.long)
    assert hoisted.routed is not None
    assert hoisted.key is not None
    assert hoisted.value is not None
    after = segment_loop(
        states,
        hoisted.routed,
        hoisted.key,
        hoisted.value,
        LoopSegments(plan.relation.sources.ptr, num_active),
        _weights(cell),
        cell.attention.heads,
        keep=keep,
        backend="cpu",
    )
    steps = after.split([step.num_dst for step in plan.steps])
    before = [states, *steps][:-1]
    before = [rows[: step.num_dst] for rows, step in zip(before, plan.steps, strict=True)]
    # Examples finish from the back.
    finished, left = [], states
    for rows in steps:
        if rows.size(0) < left.size(0):
            finished.append(left[rows.size(0) :])
        left = rows
    trace = Trace(torch.cat([left, *finished[::-1]]), None)
    trace.before, trace.after, trace.reads = before, list(steps), [None] * len(steps)
    return trace


def say_why_not(reason: str) -> None:
    """Once for every reason."""
    if reason not in _said:
        _said.add(reason)
        logger.info("segments are read step by step, not in one kernel: %s", reason)


def _weights(cell: StateMachineCell) -> LoopWeights:
    attention, propagator, talk = cell.attention, cell.propagator, cell.communication
    parts = [attention.lin_query, attention.lin_out, propagator.lin_gates]
    parts.append(propagator.lin_candidate)
    parts += [] if talk is None else [talk.lin_qkv, talk.lin_out, talk.norm]
    found = [tensor for part in parts for tensor in (part.weight, part.bias)]
    return LoopWeights(*found, *[None] * (14 - len(found)))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: What the cell is made of; a part of another type may do anything.
_KINDS = (HybridAttention, StatePropagator, StateCommunication, Linear, nn.LayerNorm)


def _is_plain(cell: StateMachineCell) -> bool:
    """Whether the cell's parts are this library's own, as it made them, and nobody watches."""
    if type(cell) is not StateMachineCell or _is_watched(cell):
        return False
    talk = cell.communication
    parts = [part for part in (cell.attention, cell.propagator, talk) if part is not None]
    for module in (module for part in parts for module in part.modules()):
        if type(module) is _Aggregation:
            continue
        if type(module) not in _KINDS or _is_watched(module):
            return False
        if type(module) is Linear and module.bias is None:
            return False
    if talk is None:
        return True
    has_usual_norm = talk.norm.eps == 1e-5 and talk.norm.bias is not None
    return has_usual_norm and talk.heads == cell.attention.heads


def _is_watched(module: nn.Module) -> bool:
    """Torch's hooks and PyG's, and methods of its own."""
    held = vars(module)
    if any(held[hooks] for hooks in _HOOKS) or "forward" in held or "attend" in held:
        return True
    return isinstance(module, MessagePassing) and is_watched(module)
