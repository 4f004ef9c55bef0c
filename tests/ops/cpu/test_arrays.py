"""Memory for kernels: where it begins, how far apart rows lie, and what numbers are in it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.cpu import arrays

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def begins_at_a_line(x):
    return x.ctypes.data % 64 == 0


@dtypes
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (33, 48), (2, 3, 5), (1000, 1000)])
def test_empty_begins_at_a_cache_line(shape, dtype):
    held = [arrays.empty(dtype, *shape) for _ in range(8)]
    for x in held:
        assert begins_at_a_line(x)
        assert x.shape == shape and x.flags.c_contiguous and x.flags.writeable
        assert x.dtype == torch.empty(0, dtype=dtype).numpy().dtype


@dtypes
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_nothing_has_no_numbers(shape, dtype):
    assert arrays.empty(dtype, *shape).shape == shape


@given(st.integers(1, 5000))
def test_rows_are_an_odd_number_of_lines_apart(num_columns):
    width = arrays.spread(num_columns)
    assert num_columns <= width < num_columns + 2 * arrays.LINE
    assert width % arrays.LINE == 0
    assert width // arrays.LINE % 2 == 1


@pytest.mark.parametrize(
    ("num_columns", "width"),
    [(1, 16), (16, 16), (17, 48), (32, 48), (48, 48), (49, 80), (64, 80), (128, 144), (256, 272)],
)
def test_some_widths(num_columns, width):
    assert arrays.spread(num_columns) == width


@given(st.integers(1, 512), st.sampled_from([4, 8]))
def test_neighbours_in_a_column_share_no_set_of_the_cache(num_columns, size):
    # A first-level cache of 32 KiB has 64 sets of eight lines; bits 6 to 11 of an address choose.
    stride = arrays.spread(num_columns) * size
    sets = {row * stride // 64 % 64 for row in range(64 * 4 // size)}
    assert len(sets) == 64 * 4 // size


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (7, 17), (33, 64), (48, 130)])
def test_a_placed_matrix_has_its_numbers_and_zeros_beside_them(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    for given_x in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, : shape[1]]):
        found = arrays.place(given_x)
        assert begins_at_a_line(found)
        assert found.shape == (shape[0], arrays.spread(shape[1])) and found.flags.c_contiguous
        assert np.array_equal(found[:, : shape[1]], x.numpy())
        assert (found[:, shape[1] :] == 0).all()
        assert found.dtype == x.numpy().dtype


@dtypes
@pytest.mark.parametrize("size", [1, 16, 17, 130])
def test_a_placed_vector_has_its_own_size(size, dtype):
    x = torch.randn(size, 2, dtype=dtype)[:, 1]
    found = arrays.place(x)
    assert begins_at_a_line(found) and found.flags.c_contiguous
    assert np.array_equal(found, x.numpy())


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5), (5, 0)])
def test_nothing_is_placed_as_nothing(shape):
    # Kernels tell by the first size that there is no such matrix.
    assert arrays.place(torch.empty(shape)).shape == shape


def test_what_is_placed_is_a_copy():
    for x in (torch.zeros(3, 16), torch.zeros(16), torch.zeros(3, 16, requires_grad=True)):
        found = arrays.place(x)
        found[...] = 1
        assert (x == 0).all()


def test_an_array_is_the_tensor_itself_where_its_rows_lie_side_by_side():
    x = torch.zeros(3, 5, requires_grad=True)
    found = arrays.array(x)
    assert found.ctypes.data == x.data_ptr()
    for view in (x.T, x[:, 1:], x[:1].expand(4, 5)):
        found = arrays.array(view)
        assert found.flags.c_contiguous
        assert np.array_equal(found, view.detach().numpy())
