"""Kernels on several threads: rows are independent, and kernels release the interpreter lock.

Numba's own threading layers abort when two Python threads launch at once, or after a fork. A pool
of plain threads does neither, and the number of threads is torch's at every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch

#: Multiply-adds below which a second thread costs more than it saves.
MIN_WORK = 1 << 19

_pool: ThreadPoolExecutor | None = None


def run_rows(kernel: Callable, ptr: np.ndarray, work_per_edge: int, *arguments: object) -> None:
    """Calls ``kernel(*arguments, first, end)`` on ranges of rows with about equally many edges.

    Args:
        kernel: Writes only what belongs to the rows of its range.
        ptr: ``[rows + 1]``, where the edges of each row begin.
        work_per_edge: Multiply-adds that an edge costs.
        arguments: What every range gets.
    """
    run_all(kernel, [(*arguments, *part) for part in share_rows(ptr, work_per_edge)])


def share_rows(ptr: np.ndarray, work_per_edge: int) -> list[tuple[int, int]]:
    """Ranges of rows for the threads, with about equally many edges; one where there is little."""
    num_rows, num_edges = len(ptr) - 1, int(ptr[-1])
    num_threads = torch.get_num_threads()
    if num_threads == 1 or num_edges * work_per_edge < MIN_WORK:
        return [(0, num_rows)]
    # A row costs something without edges, too: writing its zeros.
    cost = ptr + np.arange(num_rows + 1)
    shares = np.arange(num_threads + 1) * (int(cost[-1]) / num_threads)
    ends = np.searchsorted(cost, shares)
    ends[0], ends[-1] = 0, num_rows
    return [(int(a), int(b)) for a, b in pairwise(ends) if a < b]


def run_all(kernel: Callable, calls: list[tuple]) -> None:
    """Calls a kernel with each tuple of arguments: the first here, the others in threads."""
    waiting = []
    try:
        for arguments in calls[1:]:
            waiting.append(_threads().submit(kernel, *arguments))
    except RuntimeError:  # the interpreter is about to end and starts no more threads
        pass
    try:
        kernel(*calls[0])
        for arguments in calls[1 + len(waiting) :]:
            kernel(*arguments)
    finally:
        # Whatever happened here, nobody may write into arrays that are no longer ours.
        for future in waiting:
            future.exception()
    for future in waiting:
        future.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="nsm_graph")
    return _pool


def _forget_pool() -> None:
    """After a fork the child has no threads; it starts its own."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
