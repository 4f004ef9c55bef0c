"""Writing past the cache: every number arrives, wherever it begins, and nothing else is written."""

import threading

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.arrays import empty
from nsm_graph.ops.cpu.compiled import BORROWING

DTYPES = (torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
MARK = 123.0


@numba.njit(**BORROWING)
def write_past(out, place, x):
    vectors.write_past(out, place, x)
    vectors.settle()


@numba.njit(**BORROWING)
def write_rows(out, place, x):
    for i in range(x.shape[0]):
        vectors.write_past(out, place + i * x.shape[1], x[i])
    vectors.settle()


def marked(dtype, size):
    """Memory that begins at a cache line, as kernels get it."""
    out = empty(dtype, size)
    assert out.ctypes.data % 64 == 0
    out[:] = MARK
    return out


def check(dtype, place, x):
    out = marked(dtype, place + len(x) + 40)
    write_past(out, place, x)
    assert np.array_equal(out[place : place + len(x)], x, equal_nan=True)
    assert (out[:place] == MARK).all() and (out[place + len(x) :] == MARK).all()


@dtypes
@pytest.mark.parametrize("place", [0, 8, 16, 24, 64, 1, 3, 7, 9, 15, 17])
def test_any_number_of_numbers_at_a_line_or_beside_it(place, dtype):
    numbers = torch.randn(70, dtype=dtype).numpy()
    for count in range(71):
        check(dtype, place, numbers[:count])


@given(
    place=st.integers(0, 100), count=st.integers(0, 300), first=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_the_numbers_may_begin_anywhere(place, count, first, dtype):
    # What is read need not begin at a line, and what lies around it is not read into the result.
    whole = torch.full((first + count + 40,), float("nan"), dtype=dtype).numpy()
    whole[first : first + count] = np.arange(count)
    check(dtype, place, whole[first : first + count])


@dtypes
def test_numbers_are_copied_bit_for_bit(dtype):
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, info.max, info.min, info.tiny, info.tiny / 4, np.inf, -np.inf, np.nan]
    x = np.array(numbers * 5, torch.empty(0, dtype=dtype).numpy().dtype)
    for place in (0, 16, 5):
        out = marked(dtype, 100)
        write_past(out, place, x)
        assert out[place : place + len(x)].tobytes() == x.tobytes()


@dtypes
@pytest.mark.parametrize("width", [1, 7, 8, 16, 17, 40])
def test_rows_one_after_another(width, dtype):
    # Where rows are no whole vectors, most begin beside a line.
    wide = torch.randn(9, width + 5, dtype=dtype).numpy()
    x = wide[:, 2 : 2 + width]
    for place in (0, 16, 3):
        out = marked(dtype, place + x.size + 40)
        write_rows(out, place, x)
        assert np.array_equal(out[place : place + x.size], x.reshape(-1))
        assert (out[:place] == MARK).all() and (out[place + x.size :] == MARK).all()


@dtypes
def test_what_was_in_the_cache_does_not_come_back(dtype):
    # Lines that were read and written just before are in the cache when they are written past it.
    out = marked(dtype, 4096)
    for turn in range(50):
        out += 1
        write_past(out, 0, np.full(4096, turn, out.dtype))
        assert (out == turn).all()


def test_another_thread_sees_what_was_settled():
    out, x = marked(torch.float32, 1 << 16), np.empty(1 << 16, np.float32)
    written, seen, wrong = threading.Event(), threading.Event(), []

    def read():
        for turn in range(50):
            written.wait()
            written.clear()
            wrong.extend(out[out != turn])
            seen.set()

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(50):
        x[:] = turn
        write_past(out, 0, x)
        written.set()
        seen.wait()
        seen.clear()
    reader.join()
    assert not wrong
