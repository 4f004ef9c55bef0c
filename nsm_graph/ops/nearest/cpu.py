"""The k most similar sources, for processors: products nominate, differences decide.

A few targets at a time are multiplied with all sources of their example, in the cache. A few more
than k sources are nominated by that, compared exactly, and chosen from. If a source that was not
nominated could have been closer, given the rounding of products, the target looks at all; so it
does where too many are equally close.

Legend: N targets, M sources, C channels.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu.arrays import array, spread
from nsm_graph.ops.cpu.compiled import OPTIONS, Kernel
from nsm_graph.ops.cpu.matmul import DEPTH, add_product, affine
from nsm_graph.ops.cpu.threads import run_all, share_rows
from nsm_graph.ops.nearest.measures import Measure
from nsm_graph.partition import Partition

Array = Any  # numpy arrays in Python, Numba's in kernels

#: Sources that are nominated beyond the k.
SLACK = 4
#: Targets that are multiplied together.
ROWS = 32
#: Of every so manieth similarity the largest is kept.
LANES = 64
#: Up to so many sources, all are compared exactly.
FEW = 2 * LANES


def nearest(
    targets: Tensor,
    sources: Tensor,
    k: int,
    measure: Measure,
    target_nodes: Partition,
    source_nodes: Partition,
    without_self: bool,
) -> Tensor:
    """``[N, k]``, ascending; see the package."""
    x_NC, y_MC = array(targets), array(sources)
    y_CM = np.zeros((y_MC.shape[1], spread(len(y_MC))), y_MC.dtype)
    y_CM[:, : len(y_MC)] = y_MC.T
    ptr_N, ptr_M = array(target_nodes.ptr), array(source_nodes.ptr)
    chosen_Nk = torch.empty(len(x_NC), k, dtype=torch.long)
    arguments = (
        x_NC, y_MC, y_CM, ptr_N, ptr_M, source_nodes.max_count, measure.unit(targets),
        measure.is_distance, without_self, chosen_Nk.numpy(),
    )  # fmt: skip
    rows = np.arange(len(x_NC) + 1)
    shares = share_rows(rows, source_nodes.max_count * targets.size(1))
    run_all(nearest_kernel, [(*arguments, *share) for share in shares])
    return chosen_Nk


@numba.njit(**OPTIONS)
def _square(x_NC, n):  # type: ignore[no-untyped-def]
    total = x_NC.dtype.type(0)
    for c in range(x_NC.shape[1]):
        total += x_NC[n, c] * x_NC[n, c]
    return total


@numba.njit(**OPTIONS)
def _sort(index, count):  # type: ignore[no-untyped-def]
    """The first few numbers, in place."""
    for p in range(1, count):
        number, at = index[p], p
        while at > 0 and index[at - 1] > number:
            index[at] = index[at - 1]
            at -= 1
        index[at] = number


@numba.njit(**OPTIONS)
def _nominate(similarity, most, num_wanted, index):  # type: ignore[no-untyped-def]
    """A value that at least so many similarities reach, and how many do: those are nominated.

    The largest of every 64th are found side by side. Enough of these reach the value, and few other
    similarities do. More than there is room for are not written down.
    """
    num = len(similarity)
    most[:] = -np.inf
    whole = num - num % LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            value = similarity[start + lane]
            most[lane] = value if value > most[lane] else most[lane]
    for m in range(whole, num):
        most[m - whole] = max(most[m - whole], similarity[m])
    value = -np.inf
    for lane in range(LANES):
        num_larger = num_equal = 0
        for other in range(LANES):
            num_larger += most[other] > most[lane]
            num_equal += most[other] == most[lane]
        if num_larger < num_wanted <= num_larger + num_equal:
            value = most[lane]
            break
    count = 0
    for lane in range(LANES):
        if most[lane] < value:
            continue
        for m in range(lane, num, LANES):
            if similarity[m] >= value:
                if count < len(index):
                    index[count] = m
                count += 1
    return value, count


@numba.njit(**OPTIONS)
def _compare(x_NC, n, y_MC, first, index, count, is_distance, values):  # type: ignore[no-untyped-def]
    """Exact similarities of one target and some sources."""
    for p in range(count):
        m = first + index[p]
        total = x_NC.dtype.type(0)
        if is_distance:
            for c in range(x_NC.shape[1]):
                difference = x_NC[n, c] - y_MC[m, c]
                total -= difference * difference
        else:
            for c in range(x_NC.shape[1]):
                total += x_NC[n, c] * y_MC[m, c]
        values[p] = total if total == total else -np.inf


@numba.njit(**OPTIONS)
def _choose(index, values, count, itself, best, best_values):  # type: ignore[no-untyped-def]
    """The k largest of sources in ascending order, equal ones from the front; the least value."""
    k, num = len(best), 0
    for p in range(count):
        value = values[p]
        if index[p] == itself or (num == k and not value > best_values[k - 1]):
            continue
        at = num if num < k else k - 1
        num = min(num + 1, k)
        while at > 0 and best_values[at - 1] < value:
            best_values[at], best[at] = best_values[at - 1], best[at - 1]
            at -= 1
        best_values[at], best[at] = value, index[p]
    return best_values[k - 1]


@Kernel
def nearest_kernel(
    x_NC: Array,
    y_MC: Array,
    y_CM: Array,
    ptr_N: Array,
    ptr_M: Array,
    most: int,
    unit: float,
    is_distance: bool,
    without_self: bool,
    chosen_Nk: Array,
    first: int,
    end: int,
) -> None:
    """Chooses for the targets of a range."""
    k = chosen_Nk.shape[1]
    products = np.zeros((ROWS, most + LANES), x_NC.dtype)
    offset = np.zeros(most + LANES, x_NC.dtype)
    values, every = np.zeros(most, x_NC.dtype), np.arange(most)
    some, largest_of = np.zeros(4 * (k + SLACK), np.int64), np.zeros(LANES, x_NC.dtype)
    best_values = np.zeros(k, x_NC.dtype)
    for example in range(len(ptr_N) - 1):
        low, high = max(ptr_N[example], first), min(ptr_N[example + 1], end)
        start, num = ptr_M[example], ptr_M[example + 1] - ptr_M[example]
        if low >= high:
            continue
        is_short = num <= FEW or k + SLACK > LANES // 2
        largest = x_NC.dtype.type(0)
        for m in range(num):
            square = _square(y_MC, start + m)
            largest = max(largest, square)
            # Half of minus the squared distance, but for a number that all sources share.
            offset[m] = -square / 2 if is_distance else 0
        for row in range(low, high, ROWS):
            num_rows = min(ROWS, high - row)
            if not is_short:
                part = products[:num_rows, :num]
                own, other = x_NC[row : row + num_rows], y_CM[:, start : start + num]
                affine(part, own[:, :DEPTH], other[:DEPTH], offset[:num])
                if len(other) > DEPTH:
                    add_product(part, own[:, DEPTH:], other[DEPTH:])
            for n in range(row, row + num_rows):
                itself = n - ptr_N[example] if without_self else -1
                nominated, count, bound = every, num, -np.inf
                if not is_short:
                    similarity = products[n - row, :num]
                    if itself >= 0:
                        similarity[itself] = -np.inf
                    bound, num_some = _nominate(similarity, largest_of, k + SLACK, some)
                    square = _square(x_NC, n)
                    if is_distance:
                        bound = 2 * bound - square
                    bound += unit * max(square, largest)
                    if k <= num_some <= len(some):
                        nominated, count = some, num_some
                        _sort(some, num_some)
                while True:
                    _compare(x_NC, n, y_MC, start, nominated, count, is_distance, values)
                    least = _choose(nominated, values, count, itself, chosen_Nk[n], best_values)
                    if count == num or least > bound:
                        break
                    nominated, count = every, num
                _sort(chosen_Nk[n], k)
                for p in range(k):
                    chosen_Nk[n, p] += start
