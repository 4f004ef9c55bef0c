"""Hoisting and the loop over segments as one operation, where the cell is the documented one.

On a GPU tokens are hoisted by torch's operations, and the loop is one kernel.

The same numbers as the cell's own modules, up to rounding. What the loop's operation does not know
goes step by step, and the log named ``nsm_graph`` says why, once.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import SumAggregation as _Aggregation
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.fused_scan import loop_scan
from nsm_graph.models.loop import Trace
from nsm_graph.models.segments import SegmentPlan
from nsm_graph.models.state import ScanTokens
from nsm_graph.nn import (
    HybridAttention,
    SegmentScan,
    StateCommunication,
    StatePropagator,
    TokenConvolution,
    TokenToStateRouter,
)
from nsm_graph.nn.edge_attention_layer import is_watched
from nsm_graph.nn.scan_heads import MemoryHeads, TransitionHeads
from nsm_graph.nn.scan_layer import ScanLayer
from nsm_graph.ops.hoist import HoistWeights
from nsm_graph.ops.segment_loop import (
    LoopSegments,
    LoopWeights,
    segment_loop,
    token_loop,
    why_not_triton,
)
from nsm_graph.topology.base import Complete

#: Memories of a scan that a thread holds for backward, of all tokens of one segment, at most.
SCAN_BYTES = 1 << 26

logger = logging.getLogger("nsm_graph")
_said: set[str] = set()


def why_not_fused(
    cell: StateMachineCell, states: Tensor, *, record: bool = False,
    bptt_segments: int | None = None, num_states: int | None = None, longest: int = 1,
) -> str | None:  # fmt: skip
    """Why the loop has to go step by step; None where it need not.

    An example has ``num_states`` states, None for as many as there are slots, and the longest
    segment so many tokens.
    """
    if not cell.fuse:
        return "cell.fuse is False"
    backend = _backend(states)
    if backend is None:
        return f"there is no kernel for {states.device.type}"
    if backend == "triton" and cell.fuse != "triton":
        return 'the kernel for a GPU was never timed on one; cell.fuse = "triton" asks for it'
    narrow = (torch.bfloat16, torch.float16) if backend == "triton" else ()
    if states.dtype not in (torch.float32, *narrow):
        return f"{states.dtype} asks for the reference"
    if torch.compiler.is_compiling() or cell._compiled_call_impl is not None:
        return "the cell is compiled"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform has to see every operation"
    if torch.is_autocast_enabled(states.device.type):
        return "autocast chooses the type of every operation"
    if cell.snap is not None:
        return "a snap acts in every step"
    if cell.mix != "sum" or cell.relative is not None:
        return "attention has a bias, or routing and attention are not added"
    if cell.router.top_k is not None:
        return "not every token has an edge to every state"
    if cell.topology is not None and type(cell.topology) is not Complete:
        return f"states talk along {cell.topology!r}"
    if record or bptt_segments is not None:
        return "steps are recorded, or the history is cut"
    if not _is_plain(cell) or any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS):
        return "a part of the cell was replaced, or a hook watches it"
    if backend == "triton":
        return _why_not_on_a_gpu(cell, states, num_states)
    return None if cell.scan is None else _why_scan_is_not_fused(cell, states, num_states, longest)


def _backend(states: Tensor) -> str | None:
    """Of the loop, by the device; None where it has no kernel."""
    return {"cpu": "cpu", "cuda": "triton"}.get(states.device.type)


def _why_not_on_a_gpu(cell: StateMachineCell, states: Tensor, num_states: int | None) -> str | None:
    if cell.scan is not None:
        return "the kernel for a GPU has no scan"
    channels = states.size(1)
    num_states = cell.router.num_states if num_states is None else num_states
    is_lstm = cell.propagator.lin_candidate is None
    gated = channels - cell.kept_channels
    return why_not_triton(states.dtype, num_states, channels, gated, is_lstm=is_lstm)


def _why_scan_is_not_fused(
    cell: StateMachineCell, states: Tensor, num_states: int | None, longest: int
) -> str | None:
    scan = cell.scan
    if type(scan) is SegmentScan and len(scan.layers) > 1:
        return "later layers of a scan read what earlier ones found"
    if type(scan) is not SegmentScan or not all(map(_is_known, scan.modules())):
        return "a part of the scan was replaced, or a hook watches it"
    layer = scan.layers[0]
    if layer.routed or layer.backend is not None:
        return "the scan's reflections are gated, or its backend was chosen"
    if len({float(heads.stretch) for heads in layer.children()}) > 1:
        return "the gates of the scan's heads are not stretched alike"
    if not _hoists_plainly(cell):
        return "keys or routed sums are not the documented ones, and there is a scan"
    rows = cell.router.num_states if num_states is None else num_states
    if 2 * longest * rows * states.size(1) * states.element_size() > SCAN_BYTES:
        return f"a scan's memories of {longest} tokens would not fit any cache"
    return None


def read_fused(
    cell: StateMachineCell,
    states: Tensor,
    cell_states: Tensor | None,
    tokens: Tensor,
    plan: SegmentPlan,
    importance: Tensor,
    slots: Tensor,
    keep: bool,
    *,
    scanned: ScanTokens | None,
    scan_reads: bool,
) -> tuple[Trace, Tensor | None, Tensor | None]:
    """Hoists and reads tokens in input order.

    What :meth:`StateMachineCell.hoist` and :func:`nsm_graph.models.loop.read_segments` do. Also
    gives the states' routing mass, ``[G N]``, and what tokens read from the scan, in the plan's
    order.
    """
    num_active = torch.tensor([step.num_examples for step in plan.steps], dtype=torch.long)
    segments = LoopSegments(plan.groups.ptr, num_active)
    heads = cell.attention.heads
    talk_heads = None if cell.communication is None else cell.communication.heads
    mass: Tensor | None
    reads = None
    backend = _backend(states)
    if backend == "cpu" and _hoists_plainly(cell):
        projections = _projections(cell, importance, slots)
        scan = None
        if scanned is not None:
            tail = None if scanned.tail is None else scanned.tail[plan.example_order]
            scan = loop_scan(cell.scan, scanned.x, tail, slots, scan_reads)
        after, final, received, last_cell, found = token_loop(
            states, tokens, plan.groups.first, projections, segments, loop_weights(cell), heads,
            scan=scan, talk_heads=talk_heads, cell=cell_states, keep=keep, backend="cpu",
        )  # fmt: skip
        if found is not None:
            reads = cell.scan.read_out(found)
        mass = None
        if cell.training:  # the weights of a token add up to one
            mass = received / plan.groups.ptr.diff().repeat_interleave(slots.numel())
    else:
        order = plan.token_order
        hoisted, weights = cell.hoist(
            tokens[order], plan.place[order], plan.relation, importance, slots
        )
        after, final, *final_cell = segment_loop(
            states, hoisted.routed, hoisted.key, hoisted.value, segments, loop_weights(cell), heads,
            talk_heads=talk_heads, cell=cell_states, keep=keep, backend=backend,
        )  # fmt: skip
        last_cell = final_cell[0] if final_cell else None
        mass = cell.routing_mass(weights, hoisted.relation)
    steps = list(after.split([step.num_dst for step in plan.steps]))
    pairs = zip([states, *steps], plan.steps, strict=False)
    before = [rows[: step.num_dst] for rows, step in pairs]
    return Trace(final, last_cell, before, steps, [None] * len(steps)), mass, reads


def say_why_not(reason: str) -> None:
    """Once for every reason."""
    if reason not in _said:
        _said.add(reason)
        logger.info("segments are read step by step, not in one kernel: %s", reason)


def _projections(cell: StateMachineCell, importance: Tensor, slots: Tensor) -> HoistWeights:
    router, key, value = cell.router, cell.attention.lin_token, cell.attention.lin_value
    logits, logits_bias = router.logit_weights(importance, slots)
    return HoistWeights(
        key=key.weight,
        key_bias=key.bias,
        value=None if value is None else value.weight,
        value_bias=None if value is None else value.bias,
        logits=logits,
        logits_bias=logits_bias,
        out=router.lin_out.weight,
        out_bias=router.lin_out.bias,
    )


def loop_weights(cell: StateMachineCell) -> LoopWeights:
    """The cell's parameters as the loop takes them."""
    attention, propagator, talk = cell.attention, cell.propagator, cell.communication
    parts = [attention.lin_query, attention.lin_out, propagator.lin_gates]
    parts.append(propagator.lin_candidate)  # None in an LSTM
    parts += [None] * 3 if talk is None else [talk.lin_qkv, talk.lin_out, talk.norm]
    nothing = (None, None)
    found = [nothing if part is None else (part.weight, part.bias) for part in parts]
    return LoopWeights(*[tensor for pair in found for tensor in pair])


_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: What a module of the cell's is called by.
_METHODS = ("forward", "attend", "convolve", "hoist", "advance", "read_out", "prepare", "steps")

#: What the cell is made of; a part of another type may do anything.
_KINDS = (
    HybridAttention,
    Linear,
    MemoryHeads,
    ScanLayer,
    SegmentScan,
    StateCommunication,
    StatePropagator,
    TokenConvolution,
    TokenToStateRouter,
    TransitionHeads,
    nn.LayerNorm,
    nn.ModuleList,
)


def _is_plain(cell: StateMachineCell) -> bool:
    """Whether the cell's parts are this library's own, as it made them, and nobody watches."""
    if type(cell) is not StateMachineCell or _is_watched(cell):
        return False
    talk = cell.communication
    if not all(map(_are_own, (cell.attention, cell.propagator, talk))):
        return False
    if talk is None:
        return True
    return talk.norm.eps == 1e-5 and talk.norm.bias is not None


def _hoists_plainly(cell: StateMachineCell) -> bool:
    """Whether keys, values and routed sums are the documented ones, and nobody watches."""
    router = cell.router
    is_plain = cell.rotary is None and router.routing_reduce == "sum" and _are_own(router)
    return is_plain and router.heads == cell.attention.heads


def _are_own(part: nn.Module | None) -> bool:
    """Whether a part and what it is made of are as this library made them, and nobody watches."""
    modules = [] if part is None else list(part.modules())
    return all(map(_is_known, modules))


def _is_known(module: nn.Module) -> bool:
    if type(module) is _Aggregation:
        return True
    return type(module) in _KINDS and not _is_watched(module) and _has_bias(module)


def _has_bias(module: nn.Module) -> bool:
    return type(module) is not Linear or module.bias is not None


def _is_watched(module: nn.Module) -> bool:
    """Torch's hooks and PyG's, and methods of its own."""
    held = vars(module)
    if any(held[hooks] for hooks in _HOOKS) or any(name in held for name in _METHODS):
        return True
    return isinstance(module, MessagePassing) and is_watched(module)
