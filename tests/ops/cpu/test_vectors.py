"""Vector code against numpy in float64: any number of channels, any number of edges.

Whatever the code must not read is NaN, and whatever it must not write keeps a mark.
"""

import math

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.cpu import vectors

DTYPES = (np.float32, np.float64)
HEADS, ROWS, MARK = 2, 7, 123.0
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-14}


@numba.njit
def dots(out, to, a, row, head, b, index, first, last):
    vectors.dots(out, to, a, row, head, b, index, first, last)


@numba.njit
def weighted_sum(out, row, head, x, index, weights, perm, first, count, factor):
    vectors.weighted_sum(out, row, head, x, index, weights, perm, first, count, factor)


@numba.njit
def softmax(scores, first, count):
    vectors.softmax(scores, first, count)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def hidden(array, rows, head):
    """A copy that is NaN but for these rows of this head."""
    copy = np.full_like(array, np.nan)
    copy[rows, head] = array[rows, head]
    return copy


# Dot products ######################################################################


@pytest.mark.parametrize("index_type", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", range(1, 41))
def test_dots(channels, dtype, index_type, random):
    a = random.standard_normal((3, HEADS, channels)).astype(dtype)
    b = random.standard_normal((ROWS, HEADS, channels)).astype(dtype)
    index = random.integers(ROWS, size=9).astype(index_type)
    for row, head, first, last in ((0, 1, 0, 8), (2, 0, 3, 8), (1, 1, 6, 8), (0, 0, 8, 8)):
        used = index[np.minimum(first + np.arange(4), last)]
        out = np.full(8, MARK, dtype)
        dots(out, 2, hidden(a, [row], head), row, head, hidden(b, used, head), index, first, last)
        x, y = a[row, head].astype(np.float64), b[used, head].astype(np.float64)
        error = np.abs(out[2:6] - y @ x)
        assert (error <= TOLERANCE[dtype] * (np.abs(y) @ np.abs(x))).all()
        assert (out[[0, 1, 6, 7]] == MARK).all()


# Weighted sums #####################################################################


@pytest.mark.parametrize("index_type", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", range(1, 41))
def test_weighted_sum(channels, dtype, index_type, random):
    x = random.standard_normal((ROWS, HEADS, channels)).astype(dtype)
    index = random.integers(ROWS - 1, size=45).astype(index_type)  # nobody needs the last row
    perm = random.permutation(45)
    weights = random.standard_normal((45, HEADS)).astype(dtype)
    for count in range(41):
        row, head, first = count % 3, count % HEADS, count % 5
        edges = slice(first, first + count)
        out = np.full((3, HEADS, channels), MARK, dtype)
        given_x = hidden(x, index[edges], head)
        given_weights = hidden(weights, perm[edges], head)
        factor = dtype(0.5)
        weighted_sum(out, row, head, given_x, index, given_weights, perm, first, count, factor)
        w, y = weights[perm[edges], head].astype(np.float64), x[index[edges], head]
        error = np.abs(out[row, head] - 0.5 * (w @ y))
        assert (error <= TOLERANCE[dtype] * (np.abs(w) @ np.abs(y))).all()
        out[row, head] = MARK
        assert (out == MARK).all()


def test_a_sum_over_no_edges_is_zero_whatever_the_factor():
    out = np.full((1, 1, 19), MARK)
    nothing = np.zeros(0, dtype=np.int64)
    empty = np.zeros((0, 1, 19))
    weighted_sum(out, 0, 0, empty, nothing, np.zeros((0, 1)), nothing, 0, 0, 3.0)
    assert not out.any()


# Softmax ###########################################################################


def softmax_of(scores, first=0):
    """The softmax, with a check that nothing was written beyond the next whole vector."""
    count = len(scores)
    end = first + -(-count // vectors.LANES) * vectors.LANES
    buffer = np.full(end + vectors.LANES, np.nan, scores.dtype)
    buffer[:first] = buffer[end:] = MARK
    buffer[first : first + count] = scores
    softmax(buffer, first, count)
    assert (buffer[:first] == MARK).all() and (buffer[end:] == MARK).all()
    return buffer[first : first + count]


def oracle(scores):
    """In float64, but for the distance to the highest score; zeros where everything is absent."""
    if not np.isfinite(scores).any():
        return np.zeros(len(scores))
    powers = np.exp((scores - scores.max()).astype(np.float64))
    return powers / powers.sum()


def assert_close(actual, wanted, dtype):
    # Next to nothing, float32 has no more than exp(-87) for exp(-800).
    assert (np.abs(actual - wanted) <= TOLERANCE[dtype] * wanted + 1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", range(41))
def test_softmax(count, dtype, random):
    for spread in (0.1, 1, 10, 100):
        scores = (spread * random.standard_normal(count)).astype(dtype)
        for first in (0, 3, 16):
            assert_close(softmax_of(scores, first), oracle(scores), dtype)
    if count > 0:
        some_absent = np.where(random.random(count) < 0.5, -np.inf, scores).astype(dtype)
        weights = softmax_of(some_absent)
        assert_close(weights, oracle(some_absent), dtype)
        assert (weights[some_absent == -np.inf] == 0).all()
        all_absent = np.full(count, -np.inf, dtype)
        assert (softmax_of(all_absent) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_softmax_of_any_numbers(dtype, data):
    width = 8 * np.dtype(dtype).itemsize
    numbers = st.floats(width=width, allow_nan=False, allow_infinity=False)
    numbers |= st.sampled_from([-math.inf, 0.0, -87.0, -88.0, 1e30, -800.0])
    scores = np.array(data.draw(st.lists(numbers, max_size=40)), dtype)
    with np.errstate(
        over="ignore"
    ):  # the highest and the lowest may be further apart than numbers go
        assert_close(softmax_of(scores), oracle(scores), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers(dtype):
    most = np.finfo(dtype).max
    weights = softmax_of(np.array([most, most, -most], dtype))
    assert weights[:2].tolist() == [0.5, 0.5] and weights[2] < 1e-37
    assert softmax_of(np.array([-most, -np.inf], dtype)).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5, 16, 17, 40])
def test_nan_stays_in_its_row(count, dtype, random):
    for place in {0, count // 2, count - 1}:
        rows = random.standard_normal((3, 48)).astype(dtype)
        scores = rows.copy()
        scores[1, place] = np.nan
        flat = scores.reshape(-1)
        for first in (0, 48, 96):
            softmax(flat, first, count)
        assert np.isnan(scores[1, :count]).all()
        for row in (0, 2):
            assert_close(scores[row, :count], oracle(rows[row, :count]), dtype)


@pytest.mark.parametrize(("dtype", "most"), [(np.float32, 3e-7), (np.float64, 1e-15)])
def test_exp_is_accurate(dtype, most):
    # The first score is the highest: its weight is the common factor of all.
    scores = np.linspace(0, -80, 1 << 16).astype(dtype)
    weights = softmax_of(scores).astype(np.float64)
    exact = np.exp(scores.astype(np.float64))
    assert (np.abs(weights / weights[0] - exact) <= most * exact).all()
