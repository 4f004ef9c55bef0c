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


@numba.njit
def softmax4(scores, count):
    vectors.softmax4(scores, count)


@numba.njit
def softmax8(scores, count):
    vectors.softmax8(scores, count)


@numba.njit
def sigmoid(x, row, first, count):
    vectors.sigmoid(x, row, first, count)


@numba.njit
def tanh(x, row, first, count):
    vectors.tanh(x, row, first, count)


@numba.njit
def softmax_columns(x):
    vectors.softmax_columns(x)


@numba.njit
def softmax_columns_backward(grad, weights):
    vectors.softmax_columns_backward(grad, weights)


@numba.njit
def transpose(out, x):
    vectors.transpose(out, x)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softmax", "width"), [(softmax4, 4), (softmax8, 8)])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 9])
def test_short_softmax(num_groups, softmax, width, dtype, random):
    count = num_groups * width
    end = -(-count // vectors.LANES) * vectors.LANES
    for spread in (0.1, 10, 100):
        buffer = np.full(end + vectors.LANES, MARK, dtype)
        groups = (spread * random.standard_normal((num_groups, width))).astype(dtype)
        groups[random.random(groups.shape) < 0.2] = -np.inf
        groups[0] = -np.inf
        if num_groups > 2:
            groups[1, 1] = np.nan  # stays in its group
        buffer[:count] = groups.reshape(-1)
        softmax(buffer, count)
        assert (buffer[end:] == MARK).all()
        for number, (weights, scores) in enumerate(
            zip(buffer[:count].reshape(groups.shape), groups, strict=True)
        ):
            if num_groups > 2 and number == 1:
                assert np.isnan(weights).all()
            else:
                assert_close(weights, oracle(scores), dtype)
                assert (weights[scores == -np.inf] == 0).all()


@pytest.mark.parametrize(("dtype", "most"), [(np.float32, 3e-7), (np.float64, 1e-15)])
def test_exp_is_accurate(dtype, most):
    # The first score is the highest: its weight is the common factor of all.
    scores = np.linspace(0, -80, 1 << 16).astype(dtype)
    weights = softmax_of(scores).astype(np.float64)
    exact = np.exp(scores.astype(np.float64))
    assert (np.abs(weights / weights[0] - exact) <= most * exact).all()


# Sigmoid and tanh ##################################################################

ELEMENTWISE = {
    "sigmoid": (sigmoid, lambda x: 1 / (1 + np.exp(-x.astype(np.float64)))),
    "tanh": (tanh, lambda x: np.tanh(x.astype(np.float64))),
}
elementwise = pytest.mark.parametrize("name", ELEMENTWISE)


def applied(name, numbers):
    """The function of some numbers, with a check that nothing else was written."""
    function, _ = ELEMENTWISE[name]
    x = np.full((3, len(numbers) + 40), MARK, numbers.dtype)
    x[1, 5 : 5 + len(numbers)] = numbers
    function(x, 1, 5, len(numbers))
    found = x[1, 5 : 5 + len(numbers)].copy()
    x[1, 5 : 5 + len(numbers)] = MARK
    assert (x == MARK).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@elementwise
def test_elementwise_functions(name, dtype, random):
    for count in range(71):
        numbers = (3 * random.standard_normal(count)).astype(dtype)
        error = np.abs(applied(name, numbers) - ELEMENTWISE[name][1](numbers))
        assert (error <= TOLERANCE[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_is_accurate_near_zero_too(dtype):
    numbers = np.linspace(-80, 80, 1 << 16).astype(dtype)
    exact = ELEMENTWISE["sigmoid"][1](numbers)
    assert (np.abs(applied("sigmoid", numbers) - exact) <= TOLERANCE[dtype] * exact).all()


@pytest.mark.parametrize("dtype", DTYPES)
@elementwise
def test_extreme_numbers_reach_the_ends_and_zero_the_middle(name, dtype):
    most = np.finfo(dtype).max
    high, low = (
        applied(name, sign * np.array([40, 90, 100, 1000, most, np.inf], dtype)) for sign in (1, -1)
    )
    assert (high == 1).all()
    assert (low >= (0 if name == "sigmoid" else -1)).all()
    assert (low <= (1e-17 if name == "sigmoid" else -1)).all()
    zeros = applied(name, np.array([0.0, -0.0, np.finfo(dtype).tiny], dtype))
    assert (zeros == (0.5 if name == "sigmoid" else 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 5, 16, 17, 40])
@elementwise
def test_nan_is_nan_and_nothing_else(name, count, dtype, random):
    numbers = random.standard_normal(count).astype(dtype)
    for place in range(count):
        broken = numbers.copy()
        broken[place] = np.nan
        found = applied(name, broken)
        assert (np.isnan(found) == (np.arange(count) == place)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@elementwise
@given(data=st.data())
def test_elementwise_functions_of_any_numbers(name, dtype, data):
    width = 8 * np.dtype(dtype).itemsize
    numbers = st.lists(st.floats(width=width, allow_nan=False), max_size=40)
    numbers = np.array(data.draw(numbers), dtype)
    with np.errstate(over="ignore"):
        exact = ELEMENTWISE[name][1](numbers)
    assert (np.abs(applied(name, numbers) - exact) <= TOLERANCE[dtype]).all()


# Softmax down columns ##############################################################


def among(x, fill=MARK):
    """The same matrix as some columns of a wider one, and the wider one."""
    wide = np.full((x.shape[0] + 2, x.shape[1] + 40), fill, x.dtype)
    view = wide[1:-1, 7 : 7 + x.shape[1]]
    view[:] = x
    return view, wide


def untouched(wide, num_columns):
    around = wide.copy()
    around[1:-1, 7 : 7 + num_columns] = MARK
    return (around == MARK).all()


def weights_of(scores):
    powers = np.exp((scores - scores.max(axis=0, initial=-np.inf)).astype(np.float64))
    return powers / powers.sum(axis=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [*range(6), 16, 33])
def test_softmax_columns(num_rows, dtype, random):
    for num_columns in range(1, 71):
        for spread in (1, 30):
            given_scores = (spread * random.standard_normal((num_rows, num_columns))).astype(dtype)
            for place in (lambda x: (x.copy(), None), among):
                scores, wide = place(given_scores)
                softmax_columns(scores)
                wanted = weights_of(given_scores)
                assert (np.abs(scores - wanted) <= TOLERANCE[dtype] * wanted + 1e-37).all()
                assert wide is None or untouched(wide, num_columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [*range(6), 16, 33])
def test_softmax_columns_backward(num_rows, dtype, random):
    for num_columns in range(1, 71):
        shape = (num_rows, num_columns)
        weights = weights_of(random.standard_normal(shape)).astype(dtype)
        given_grad = random.standard_normal(shape).astype(dtype)
        w, g = weights.astype(np.float64), given_grad.astype(np.float64)
        wanted, size = w * (g - (w * g).sum(0)), w * (np.abs(g) + (w * np.abs(g)).sum(0))
        for place in (lambda x: (x.copy(), None), among):
            grad, wide = place(given_grad)
            softmax_columns_backward(grad, among(weights, np.nan)[0] if wide is None else weights)
            assert (np.abs(grad - wanted) <= TOLERANCE[dtype] * size).all()
            assert wide is None or untouched(wide, num_columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_has_weight_one_and_no_slope(dtype, random):
    scores = (100 * random.standard_normal((1, 41))).astype(dtype)
    grad = random.standard_normal((1, 41)).astype(dtype)
    softmax_columns(scores)
    assert (scores == 1).all()
    softmax_columns_backward(grad, scores)
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_extreme_scores(dtype):
    most = np.finfo(dtype).max
    scores = np.array([[most, 0, -np.inf], [-most, 1000, 0], [most, -1000, 0]], dtype)
    softmax_columns(scores)
    wanted = np.array([[0.5, 0, 0], [0, 1, 0.5], [0.5, 0, 0.5]])
    assert (np.abs(scores - wanted) <= 1e-37).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_column(dtype, random):
    given_scores = random.standard_normal((5, 41)).astype(dtype)
    given_grad = random.standard_normal((5, 41)).astype(dtype)
    for column in range(41):
        others = np.arange(41) != column
        scores, grad = given_scores.copy(), given_grad.copy()
        scores[column % 5, column] = np.nan
        softmax_columns(scores)
        wanted = weights_of(given_scores)[:, others]
        assert np.isnan(scores[:, column]).all()
        assert (np.abs(scores[:, others] - wanted) <= TOLERANCE[dtype]).all()
        softmax_columns_backward(grad, scores)
        assert np.isnan(grad[:, column]).all()
        assert np.isfinite(grad[:, others]).all()


# Transpose #########################################################################


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [*range(10), 15, 16, 17, 31, 33, 48])
def test_transpose(num_rows, dtype, random):
    for num_columns in range(71):
        x = random.standard_normal((num_rows, num_columns)).astype(dtype)
        for place in (lambda x: (x.copy(), None), among):
            out, wide = place(np.full((num_columns, num_rows), np.nan, dtype))
            source = x if wide is not None else among(x, np.nan)[0]
            transpose(out, source)
            assert np.array_equal(out, x.T)
            assert wide is None or untouched(wide, num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_moves_nan_and_infinity_like_numbers(dtype):
    x = np.arange(35 * 41, dtype=dtype).reshape(35, 41)
    x[[0, 7, 34], [3, 40, 16]] = np.nan, np.inf, -np.inf
    out = np.zeros((41, 35), dtype)
    transpose(out, x)
    assert np.array_equal(out, x.T, equal_nan=True)
