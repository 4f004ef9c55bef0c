"""One line of a benchmark, and how times are taken."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


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
    runs: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, float]:
    """Median milliseconds of each run; they take turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
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


def _status_mib(status: Path, field: str) -> float:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
