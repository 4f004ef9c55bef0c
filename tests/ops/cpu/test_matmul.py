"""Matrix products against numpy in float64: any sizes, any strides of the left operand.

Whatever lies around an operand is NaN, and what lies around the output keeps a mark.
"""

import itertools

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.cpu import matmul

DTYPES = (np.float32, np.float64)
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-14}
MARK = 123.0


@numba.njit
def multiply(out, a, b):
    matmul.multiply(out, a, b)


@numba.njit
def add_product(out, a, b):
    matmul.add_product(out, a, b)


@numba.njit
def affine(out, a, b, bias):
    matmul.affine(out, a, b, bias)


# How a matrix may lie in memory, by name; the numbers around it are those of ``fill``.


def whole(x, fill):
    return x.copy()


def columns(x, fill):
    """Some columns of a wider matrix."""
    wide = np.full((x.shape[0] + 2, x.shape[1] + 20), fill, x.dtype)
    view = wide[1:-1, 3 : 3 + x.shape[1]]
    view[:] = x
    return view


def transposed(x, fill):
    return columns(x.T, fill).T


def strided(x, fill):
    """Every second row from the last one up, every third column."""
    wide = np.full((2 * x.shape[0], 3 * x.shape[1]), fill, x.dtype)
    view = wide[::-2, ::3]
    view[:] = x
    return view


#: Output, left and right operand.
LAYOUTS = (
    (whole, whole, whole),
    (columns, columns, columns),
    (columns, transposed, columns),
    (columns, strided, whole),
    (whole, transposed, whole),
)


class Product:
    """One product of random operands: how it is called, and what it has to be."""

    def __init__(self, name, sizes, dtype, layout=LAYOUTS[1], seed=0):
        random = np.random.default_rng([seed, *sizes])
        (rows, columns, depth), (out, left, right) = sizes, layout
        a, b, start, bias = (
            random.standard_normal(shape).astype(dtype)
            for shape in ((rows, depth), (depth, columns), (rows, columns), columns)
        )
        self.name, self.dtype = name, dtype
        self.a, self.b, self.bias = left(a, np.nan), right(b, np.nan), bias
        # Only a sum needs to know what the output was before.
        self.out = out(start if name == "add_product" else np.full_like(start, np.nan), MARK)
        self.start = {"multiply": 0, "add_product": start, "affine": bias}[name]

    def call(self):
        function = {"multiply": multiply, "add_product": add_product, "affine": affine}[self.name]
        function(self.out, self.a, self.b, *([self.bias] if self.name == "affine" else []))

    def check(self, rows=slice(None), columns=slice(None)):
        """That these rows and columns are right, and nothing around the output was written."""
        a, b = (np.nan_to_num(x.astype(np.float64)) for x in (self.a, self.b))
        wanted = (self.start + a @ b)[rows, columns]
        size = (np.abs(self.start) + np.abs(a) @ np.abs(b))[rows, columns]
        assert (np.abs(self.out[rows, columns] - wanted) <= TOLERANCE[self.dtype] * size).all()
        if self.out.base is not None:
            around = self.out.base.copy()
            around[1:-1, 3 : 3 + self.out.shape[1]] = MARK
            assert (around == MARK).all()


names = pytest.mark.parametrize("name", ["multiply", "add_product", "affine"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
@names
def test_any_number_of_rows_and_columns(name, dtype, layout):
    for rows, columns in itertools.product(range(1, 20), range(1, 71)):
        depth = (7 * rows + 3 * columns) % 21
        product = Product(name, (rows, columns, depth), dtype, layout)
        product.call()
        product.check()


@given(
    sizes=st.tuples(st.integers(0, 19), st.integers(0, 70), st.integers(0, 20)),
    name=st.sampled_from(["multiply", "add_product", "affine"]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 999),
)
def test_any_sizes_of_all_three(sizes, name, dtype, layout, seed):
    product = Product(name, sizes, dtype, layout, seed)
    product.call()
    product.check()


@dtypes
@names
def test_nothing_to_multiply_leaves_the_start(name, dtype):
    for rows, columns in ((1, 1), (8, 32), (13, 41)):
        product = Product(name, (rows, columns, 0), dtype)
        product.call()
        assert (product.out == product.start).all()


@dtypes
@names
def test_nan_on_the_left_stays_in_its_row(name, dtype):
    for row in range(13):
        product = Product(name, (13, 41, 5), dtype)
        product.a[row, row % 5] = np.nan
        product.call()
        assert np.isnan(product.out[row]).all()
        product.check(rows=np.arange(13) != row)


@dtypes
@names
def test_nan_on_the_right_stays_in_its_column(name, dtype):
    for column in range(41):
        product = Product(name, (13, 41, 5), dtype)
        product.b[column % 5, column] = np.nan
        product.call()
        assert np.isnan(product.out[:, column]).all()
        product.check(columns=np.arange(41) != column)


@dtypes
def test_nan_in_the_bias_or_in_what_is_added_to_stays_where_it_is(dtype):
    for column in (0, 17, 40):
        product = Product("affine", (13, 41, 5), dtype)
        product.bias[column] = np.nan
        product.call()
        assert np.isnan(product.out[:, column]).all()
        product.check(columns=np.arange(41) != column)
        product = Product("add_product", (13, 41, 5), dtype)
        product.out[column % 13, column] = np.nan
        product.call()
        assert (np.argwhere(np.isnan(product.out)) == [[column % 13, column]]).all()


@dtypes
@names
def test_infinity_is_what_it_is_in_numpy(name, dtype):
    product = Product(name, (13, 41, 5), dtype)
    product.a[2, 3], product.b[1, 7], product.b[3, 9] = np.inf, -np.inf, 0
    product.call()
    with np.errstate(invalid="ignore"):
        wanted = product.start + product.a.astype(np.float64) @ product.b.astype(np.float64)
    assert np.array_equal(np.isnan(product.out), np.isnan(wanted))
    assert np.array_equal(product.out == np.inf, wanted == np.inf)
    assert np.array_equal(product.out == -np.inf, wanted == -np.inf)


@dtypes
@names
def test_a_row_does_not_depend_on_how_many_there_are(name, dtype):
    """Bit for bit: whoever shares rows out among threads relies on it."""
    whole = Product(name, (29, 41, 20), dtype)
    whole.call()
    for first, end in ((0, 1), (3, 4), (0, 5), (2, 15), (8, 29)):
        part = Product(name, (29, 41, 20), dtype)
        part.out, part.a = part.out[first:end], part.a[first:end]
        part.call()
        assert np.array_equal(part.out, whole.out[first:end])
