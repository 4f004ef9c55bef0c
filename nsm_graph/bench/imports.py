"""What a new process waits for: the import, and the first call of a layer or of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from statistics import median
from typing import NamedTuple

import nsm_graph
from nsm_graph.bench.record import BenchRecord, interleaved_medians

#: At most 1.15 times the import of PyG; a first call of at most so long where kernels are on disk.
TARGET, LIMIT_MS = 1 / 1.15, 2000.0

#: A new process: what it calls is put in; float64 runs without kernels.
PROGRAM = """
import json, time, torch
import nsm_graph as nsm
torch.manual_seed(0)
{call}
start = time.perf_counter()
got = call(torch.float32)
ms = 1000 * (time.perf_counter() - start)
expected = call(torch.float64)
error = float((got.double() - expected).norm() / expected.norm())
print(json.dumps(dict(ms=ms, error=error)))
"""

#: Forward and backward of a layer over any edges, and of the machine: each has kernels of its own.
CALLS = {
    "a layer": """
layer = nsm.nn.HybridAttention(16)
x, states = torch.randn(100, 16), torch.randn(10, 16)
ends = torch.stack([torch.randint(100, (400,)), torch.randint(10, (400,))])
edges = nsm.Relation.from_edge_index(ends, (100, 10))
def call(dtype):
    layer.to(dtype).zero_grad()
    layer((x.to(dtype), states.to(dtype)), edges).square().sum().backward()
    return layer.lin_query.weight.grad
""",
    "the machine": """
machine = nsm.NeuralStateMachine(16, 16, 4, 2, segment_length=8)
x = torch.randn(64, 16)
def call(dtype):
    machine.to(dtype).zero_grad()
    machine(x.to(dtype)).square().sum().backward()
    return machine.cell.attention.lin_query.weight.grad
""",
}


class FirstCall(NamedTuple):
    """The first call in a new process."""

    ms: float
    is_right: bool  #: to 1e-5, beside float64
    said: str  #: what the log said about compiling


def bench_imports(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """Whole processes in turns; first calls with kernels on disk, and with none.

    Args:
        repetitions: Timed processes of each.
        scale: Less than 1 leaves out the processes that compile, which take half a minute.
    """
    records = [_compare_imports(repetitions)]
    for name, call in CALLS.items():
        first_call(call)  # compiles what is not on disk
        warm = [first_call(call) for _ in range(repetitions)]
        ms, is_right = median(found.ms for found in warm), all(found.is_right for found in warm)
        case = f"first call of {name}"
        records.append(
            BenchRecord(f"{case}, kernels on disk", "limit", ms, LIMIT_MS, is_right, 1.0)
        )
        if scale >= 1:
            records.append(_compile(case, call, ms))
    return records


def _compare_imports(repetitions: int) -> BenchRecord:
    runs = {name: partial(_run, f"import {name}") for name in ("nsm_graph", "torch_geometric")}
    found, _ = _run("import nsm_graph; print(nsm_graph.__file__)")
    time = interleaved_medians(runs, repetitions)
    return BenchRecord(
        "import, whole process", "torch_geometric", time["nsm_graph"], time["torch_geometric"],
        found.strip() == nsm_graph.__file__, TARGET,
    )  # fmt: skip


def _compile(case: str, call: str, warm_ms: float) -> BenchRecord:
    """A process that finds no kernel on disk: however long it takes, it is right, and says why."""
    with tempfile.TemporaryDirectory() as empty:
        cold = first_call(call, cache=empty)
    is_right = cold.is_right and (cold.said != "" or cold.ms < LIMIT_MS)
    return BenchRecord(
        f"{case}, compiling", "kernels on disk", cold.ms, warm_ms, is_right, 0.0,
        note=f"the log said: {cold.said or 'nothing, it was quick'}",
    )  # fmt: skip


def first_call(call: str, cache: str | None = None) -> FirstCall:
    """In a new process; `cache` is where it looks for kernels, if not in the usual place."""
    printed, log = _run(PROGRAM.format(call=call), cache)
    result = json.loads(printed)
    said = [line for line in log.splitlines() if line.startswith("compiling")]
    return FirstCall(result["ms"], result["error"] <= 1e-5, "; ".join(said))


def _run(program: str, cache: str | None = None) -> tuple[str, str]:
    """What a new process prints, and its log."""
    env = os.environ | ({} if cache is None else {"NUMBA_CACHE_DIR": cache})
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        why = (done.stderr.strip() or "no word").splitlines()[-1]
        raise ValueError(
            f"bench: expected {program.strip().splitlines()[0]!r} to run in a new process of this "
            f"Python; it ended with {done.returncode} ({why}); run it there to see why"
        )
    return done.stdout, done.stderr
