"""Rows on several threads: every row once, about equally many edges, no error is lost."""

import contextlib
import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.cpu import threads
from nsm_graph.ops.cpu.threads import run_rows


@contextlib.contextmanager
def several_threads(num, min_work=1):
    """As many threads as this in torch, which share any work that is at least so much."""
    num_before, work_before = torch.get_num_threads(), threads.MIN_WORK
    torch.set_num_threads(num)
    threads.MIN_WORK = min_work
    try:
        yield
    finally:
        torch.set_num_threads(num_before)
        threads.MIN_WORK = work_before


def ptr_of(degrees):
    return np.cumsum([0, *degrees])


def ranges_of(ptr, num_threads):
    """The ranges that kernels get, in order."""
    ranges = []
    with several_threads(num_threads):
        run_rows(lambda first, end: ranges.append((int(first), int(end))), ptr, 1)
    return sorted(ranges)


degree_lists = st.lists(st.integers(0, 9) | st.just(500), max_size=40)


@given(degree_lists, st.integers(1, 7), st.sampled_from([np.int32, np.int64]))
def test_every_row_is_in_exactly_one_range(degrees, num_threads, dtype):
    ranges = ranges_of(ptr_of(degrees).astype(dtype), num_threads)
    assert len(ranges) <= num_threads
    assert [row for part in ranges for row in range(*part)] == list(range(len(degrees)))


@given(degree_lists, st.integers(2, 7))
def test_no_range_has_more_than_its_share_and_a_row(degrees, num_threads):
    # A row without edges costs something, too.
    costs = [degree + 1 for degree in degrees]
    share = sum(costs) / num_threads
    for first, end in ranges_of(ptr_of(degrees), num_threads):
        assert sum(costs[first:end]) <= share + max(costs[first:end], default=0)


def test_equal_rows_make_equal_ranges():
    assert ranges_of(ptr_of([5] * 12), 3) == [(0, 4), (4, 8), (8, 12)]


def test_one_row_with_most_edges_is_one_range_with_those_before_it():
    assert ranges_of(ptr_of([1] * 10 + [1000] + [1] * 10), 3) == [(0, 11), (11, 21)]


def test_kernels_get_all_arguments_and_results_are_complete():
    out = np.zeros(100)

    def kernel(values, factor, first, end):
        values[first:end] += factor * np.arange(first, end)

    with several_threads(4):
        run_rows(kernel, ptr_of([3] * 100), 1, out, 2.0)
    assert np.array_equal(out, 2.0 * np.arange(100))


def test_the_first_range_runs_in_the_calling_thread_and_the_others_elsewhere():
    where = {}

    def kernel(first, end):
        where[first] = threading.current_thread()

    with several_threads(2):
        run_rows(kernel, ptr_of([1] * 10), 1)
    assert where[0] is threading.current_thread()
    assert where[5].name.startswith("nsm_graph")


@pytest.mark.parametrize(
    ("num_threads", "degree", "work_per_edge", "num_ranges"),
    [(1, 100, 100, 1), (4, 1, 9, 1), (4, 9, 1, 1), (4, 1, 10, 4), (4, 10, 1, 4)],
)
def test_little_work_stays_in_the_calling_thread(num_threads, degree, work_per_edge, num_ranges):
    calls = []

    def kernel(first, end):
        calls.append(threading.current_thread())

    with several_threads(num_threads, min_work=1000):
        run_rows(kernel, ptr_of([degree] * 100), work_per_edge)
    assert len(calls) == num_ranges
    assert calls.count(threading.current_thread()) == 1


@pytest.mark.parametrize("failing", [[0], [1], [3], [0, 3], [0, 1, 2, 3]])
def test_an_error_in_any_range_reaches_the_caller_after_all_ranges_have_ended(failing):
    ended = []

    def kernel(first, end):
        part = first // 5
        if part in failing:
            raise ValueError(f"range {part}")
        time.sleep(0.05)
        ended.append(part)

    with several_threads(4), pytest.raises(ValueError, match=f"range {failing[0]}"):
        run_rows(kernel, ptr_of([1] * 20), 1)
    assert sorted(ended + failing) == [0, 1, 2, 3]


def test_threads_serve_again_after_an_error():
    def fails(first, end):
        raise RuntimeError

    with several_threads(4), pytest.raises(RuntimeError):
        run_rows(fails, ptr_of([1] * 20), 1)
    assert len(ranges_of(ptr_of([1] * 20), 4)) == 4


def test_several_python_threads_may_call_at_once():
    outs = [np.zeros(200) for _ in range(8)]

    def kernel(out, first, end):
        time.sleep(0.001)
        out[first:end] += 1

    def call(out):
        for _ in range(5):
            run_rows(kernel, ptr_of([1] * 200), 1, out)

    with several_threads(3):
        callers = [threading.Thread(target=call, args=(out,)) for out in outs]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert all((out == 5).all() for out in outs)


@pytest.mark.parametrize("num_rows", [0, 1, 20])
def test_rows_without_edges(num_rows):
    assert ranges_of(ptr_of([0] * num_rows), 4) == [(0, num_rows)]


def check_in_child():
    out = np.zeros(20)
    run_rows(lambda first, end: out[first:end].fill(1), ptr_of([1] * 20), 1)
    assert out.all()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_after_a_fork_starts_its_own_threads():
    with several_threads(4):
        check_in_child()  # here, so that there are threads to forget
        child = multiprocessing.get_context("fork").Process(target=check_in_child)
        child.start()
        child.join(30)
        is_stuck = child.is_alive()
        if is_stuck:
            child.kill()
            child.join()
    assert not is_stuck
    assert child.exitcode == 0
