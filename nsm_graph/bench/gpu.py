"""Kernels on a GPU beside what people would use instead: first that they are right, then times.

Edge attention here, the machine's loop in `gpu_loop.py`.

Without a GPU the kernels run in Triton's interpreter, which says whether they are right and nothing
about their speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from nsm_graph.bench.attention import (
    Attention,
    _dense_view,
    _inputs,
    _ours,
    _pyg,
    _random_degree,
    _step,
)
from nsm_graph.bench.gpu_loop import check_loop, loop_records
from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.ops.backend import NEEDS_TRITON
from nsm_graph.ops.edge_attention import Normalise, edge_attention
from nsm_graph.relation import Relation

#: Targets, edges of each, heads, channels a head. From twice as many sources: no cache holds them.
SPARSE = (262_144, 16, 4, 32)
#: Examples, targets and sources of each, heads, channels a head.
COMPLETE = (64, 256, 1024, 8, 64)
#: Calls of one timed turn: a call is too short to wait for it alone.
CALLS = 10

NO_GPU = """\
In Triton's interpreter the kernels for a GPU give the reference's results and gradients,
{cases} cases. Torch finds no GPU, so they were not run on one, and nothing was timed: not sparse
attention beside PyG, not backward beside forward, not forward beside copying, not complete
relations beside scaled_dot_product_attention, not the machine's loop beside itself step by step,
not beside a GRU."""

TESTS = Path(__file__).parents[2] / "tests" / "ops"


def bench_gpu(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """Sparse attention in float32 and bfloat16, complete relations, a machine's training step.

    There are no records without a GPU.

    Args:
        repetitions: Timed turns of each.
        scale: Share of targets, examples and tokens of a machine; less than 1 for a quick look.
    """
    if find_spec("triton") is None:
        raise ValueError(f"bench gpu {NEEDS_TRITON}")
    if not torch.cuda.is_available():
        code = "from nsm_graph.bench import gpu; print(gpu.check_all('cpu'))"
        cases = _subprocess("-c", code, TRITON_INTERPRET="1").strip()
        print(NO_GPU.format(cases=cases))
        return []
    if TESTS.exists() and find_spec("pytest") is not None:
        _subprocess("-m", "pytest", "-q", *map(str, TESTS.glob("test_*_triton.py")))
    check_all("cuda")
    device = torch.device("cuda")
    times = partial(_times, device=device, repetitions=repetitions)
    return [
        *_sparse_records(device, repetitions, scale),
        *_complete_records(device, repetitions, scale),
        *map(_on_this_gpu, loop_records(device, times, scale)),
    ]


# Right or wrong ####################################################################


def check_all(device: str) -> int:
    """Checks every kernel; returns how many cases."""
    return check_kernels(device) + check_loop(device)


def check_kernels(device: str) -> int:
    """Compares the kernels with the reference, which serves float64; returns how many cases."""
    from nsm_graph.ops.edge_attention import gpu

    # A row of 140 edges is cut; the last targets have none.
    src = torch.arange(200) % 16
    dst = torch.cat([torch.zeros(140, dtype=torch.long), torch.arange(60) % 50])
    relation = Relation.from_edge_index(torch.stack([src, dst]), (16, 52))
    generator = torch.Generator().manual_seed(0)
    shapes = [(52, 2, 8), (16, 2, 8), (16, 2, 8), (200, 2)]
    exact = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    q64, k64, v64, bias64 = (x.requires_grad_() for x in exact)
    q, k, v, bias = (x.detach().float().to(device) for x in exact)
    edges = relation.to(device).csr, relation.to(device).csc
    groupings: tuple[Normalise, ...] = ("target", "source")
    for normalise in groupings:
        wanted = edge_attention(
            q64, k64, v64, relation, bias=bias64, normalise=normalise, scale=0.3
        )
        direction = torch.cos(wanted.detach())
        by_source = normalise == "source"
        out, stats = gpu.forward(q, k, v, bias, *edges, by_source, 0.3)
        grad = direction.float().to(device)
        grads = gpu.backward(grad, q, k, v, bias, stats, *edges, by_source, 0.3)
        pairs = zip(
            (out, *grads),
            (wanted, *torch.autograd.grad(wanted, exact, direction)),
            ("output", "query gradient", "key gradient", "value gradient", "bias gradient"),
            strict=True,
        )
        for actual, expected, name in pairs:
            if not _is_close(actual, expected.to(device), 1e-5):
                raise ValueError(f"bench gpu: by {normalise}, {name} differs from the reference")
    return len(groupings)


def _subprocess(*words: str, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, *words], env={**os.environ, **env}, capture_output=True, text=True
    )
    if run.returncode != 0:
        told = "\n".join((run.stdout + run.stderr).splitlines()[-20:])
        raise ValueError(
            f"bench gpu: expected the kernels' checks to pass; nothing is timed: {told}"
        )
    return run.stdout


def _is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (actual.double() - expected.double()).norm()
    return bool(error <= tolerance * expected.double().norm())


# Times #############################################################################


def _sparse_records(device: torch.device, repetitions: int, scale: float) -> list[BenchRecord]:
    num, degree, heads, channels = SPARSE
    relation = _random_degree(int(num * scale), degree).to(device)
    _ = relation.csr, relation.csc  # what a graph keeps, not what a call needs
    ours, pyg = _ours(relation, "target"), _pyg(relation, "target")
    wide = [x.detach().to(device) for x in _inputs(relation, heads, channels)]
    narrow = [x.bfloat16() for x in wide]
    is_right = {
        "float32": _agree(ours, wide, _step(pyg, _with_grad(wide)), 1e-5),
        "bfloat16": _agree(ours, narrow, _step(pyg, _with_grad(wide)), 2e-2),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, attend, given in (
        ("PyG", pyg, wide), ("float32", ours, wide), ("bfloat16", ours, narrow)
    ):  # fmt: skip
        *inputs, direction = _with_grad(given)
        runs[f"{name} forward"] = partial(_forward, attend, given[:3])
        runs[f"{name} both"] = partial(_step, attend, [*inputs, direction])
        out = attend(*inputs)
        runs[f"{name} backward"] = partial(
            torch.autograd.grad, out, inputs, direction, retain_graph=True
        )
    # What forward must read and write if no cache helps: a key and a value per edge and its
    # source, a query and an output per target. A copy reads and writes half of its bytes each.
    for name, item in (("float32", 4), ("bfloat16", 2)):
        rows = 2 * relation.num_edges + 2 * relation.num_dst
        num_bytes = rows * heads * channels * item + 4 * relation.num_edges
        source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)
        runs[f"{name} copy"] = partial(torch.empty_like(source).copy_, source)
    time = _times(runs, device, repetitions)
    case = f"sparse E{relation.num_edges} H{heads} D{channels}"
    records = []
    for name, faster in (("float32", 8.0), ("bfloat16", 15.0)):
        for what, peer, peer_ms, target in (
            ("forward", "PyG float32", time["PyG forward"], faster),
            ("forward and backward", "PyG float32", time["PyG both"], 4.0),
            ("backward", "own forward", time[f"{name} forward"], 0.4),
            ("forward", "copying its bytes", time[f"{name} copy"], 0.6),
        ):
            mine = time[f"{name} both" if " " in what else f"{name} {what}"]
            records.append(
                _record(f"{case} {name} {what}", peer, mine, peer_ms, is_right[name], target)
            )
    return records


def _complete_records(device: torch.device, repetitions: int, scale: float) -> list[BenchRecord]:
    examples, num, length, heads, channels = COMPLETE
    ptrs = (torch.arange(max(int(examples * scale), 1) + 1) * count for count in (length, num))
    relation = Relation.complete(*ptrs).to(device)
    given = [x.detach().to(device).bfloat16() for x in _inputs(relation, heads, channels)]
    ours, sdpa = _ours(relation, "target"), _dense_view(relation)
    is_right = _agree(ours, given, _step(sdpa, _with_grad(given)), 2e-2)
    runs: dict[str, Callable[[], object]] = {
        name: partial(_step, attend, _with_grad(given))
        for name, attend in (("ours", ours), ("SDPA", sdpa))
    }
    time = _times(runs, device, repetitions)
    case = f"complete B{relation.num_examples} {num} x {length} H{heads} D{channels} bfloat16"
    return [
        _record(case, "SDPA", time["ours"], time["SDPA"], is_right, 0.95)
    ]  # fmt: skip


def _times(
    runs: dict[str, Callable[[], object]], device: torch.device, repetitions: int
) -> dict[str, float]:
    """Milliseconds of one call, from turns of some calls in a row."""

    def calls(run: Callable[[], object]) -> None:
        for _ in range(CALLS):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a call only puts work into a queue

    turns = {name: partial(calls, run) for name, run in runs.items()}
    return {name: ms / CALLS for name, ms in interleaved_medians(turns, repetitions).items()}


def _forward(attend: Attention, given: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*given)


def _with_grad(given: list[Tensor]) -> list[Tensor]:
    return [*(x.detach().requires_grad_() for x in given[:3]), given[3]]


def _agree(ours: Attention, given: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    pairs = zip(_step(ours, _with_grad(given)), wanted, strict=True)
    return all(_is_close(a, b, tolerance) for a, b in pairs)


def _record(
    case: str, peer: str, ours_ms: float, peer_ms: float, is_right: bool, target: float
) -> BenchRecord:
    note = f"{1000 * ours_ms:.0f} us against {1000 * peer_ms:.0f}"
    record = BenchRecord(case, peer, ours_ms, peer_ms, is_right, target, note=note)
    return _on_this_gpu(record)


def _on_this_gpu(record: BenchRecord) -> BenchRecord:
    """The same with the GPU's name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return replace(record, env={**record.env, "gpu": name})
