"""One line of a benchmark, and how times are taken."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("nsm-graph", "numpy", "numba", "torch-geometric")
#: Peers that are named only where they are installed.
PEERS = (
    "dgl",
    "perceiver-pytorch",
    "block-recurrent-transformer-pytorch",
    "recurrent-memory-transformer-pytorch",
)


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        **_fixed(),
    }


@cache
def _fixed() -> dict[str, Any]:
    """What stays the same while the process lives."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that was not installed
            versions[name.replace("-", "_")] = None
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            versions[name.replace("-", "_")] = metadata.version(name)
    return {"cpu": _cpu_model(), "commit": _commit(), **versions}


def _cpu_model() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _commit() -> str | None:
    """Of the repository that keeps this file; None where none does, as in an installed package."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # it may lie inside somebody else's
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class BenchRecord:
    """Ours beside a peer's, from the same run; `ratio` above 1 means ours is better."""

    case: str
    peer: str
    ours_ms: float
    peer_ms: float
    correct: bool
    target: float
    ours_mib: float | None = None
    peer_mib: float | None = None
    measure: str = "ms"  #: what the ratio compares: ``"ms"`` or ``"mib"``
    note: str = ""  #: what else there is to know, in a line
    env: dict[str, Any] = field(default_factory=environment)

    @property
    def ratio(self) -> float:
        if self.measure == "ms":
            return self.peer_ms / self.ours_ms
        if self.ours_mib is None or self.peer_mib is None:
            return float("nan")  # this system does not tell
        return self.peer_mib / self.ours_mib if self.ours_mib > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, with the ratio."""
        return {**vars(self), "ratio": self.ratio if math.isfinite(self.ratio) else None}


def interleaved_medians(
    runs: Mapping[str, Callable[[], object]], repetitions: int, *, untimed: int = 0
) -> dict[str, float]:
    """Median milliseconds of each run; they take turns, so that all see the same machine.

    Args:
        runs: What to time, by name.
        repetitions: Timed turns of each, after one that warms up.
        untimed: Calls before each timed one, where a call leaves memory for the next of its size.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            for _ in range(untimed):
                run()
            start = time.perf_counter()
            run()
            if repetition > 0:  # the first turn warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(run: Callable[[], object]) -> float | None:
    """How far a call raises the memory of this process, in MiB; None where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would hide what is needed
    reset.write_text("5")  # the peak counts from here
    before = _status_mib(status, "VmRSS")
    run()
    return _status_mib(status, "VmHWM") - before


def resident_mib() -> float | None:
    """Memory of this process that is in use now, in MiB; None where Linux does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_mib(status, "VmRSS")


def _status_mib(status: Path, field: str) -> float:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
