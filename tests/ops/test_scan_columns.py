"""What a scan does to a memory, against numpy in float64: any number of rows and columns.

Columns are filled up with zeros, and rows with numbers that must not be read where they would show.
"""

import numba
import numpy as np
import pytest

from nsm_graph.ops.cpu.vectors import LANES
from nsm_graph.ops.delta_scan.cpu import columns

TOLERANCE = {np.float32: 3e-6, np.float64: 1e-14}
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
sizes = pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(1, 1), (3, 5), (4, 16), (5, 17), (8, 33), (17, 7), (33, 48)]
)


@numba.njit
def correct(out, error, memory, key, beta, value):
    columns.correct(out, error, memory, key, beta, value)


@numba.njit
def correct_to(out, error, memory, key, beta, value):
    columns.correct_to(out, error, memory, key, beta, value)


@numba.njit
def decay_and_write(out, memory, decay, share, row, column):
    columns.decay_and_write(out, memory, decay, share, row, column)


@numba.njit
def reduce(by_column, by_row, by_both, memory, other, rows, along, others):
    columns.combine(by_column, rows, memory)
    columns.contract(by_row, memory, along)
    columns.contract_both(by_both, memory, along, other, others)


@numba.njit
def add_up(out, a, b, memory, other):
    out[0] = columns.dot(a, b)
    out[1] = columns.inner(memory, other)


@numba.njit
def mix(out, x, factor, y, other):
    columns.mix(out, x, factor, y, other)


class Room:
    """Draws memories, and vectors of rows and of columns, with the room that they need."""

    def __init__(self, num_rows, num_columns, dtype):
        self.size, self.dtype = (num_rows, num_columns), dtype
        self.random = np.random.default_rng(0)

    def memory(self):
        num_rows, num_columns = self.size
        room = self.zeros(-(-num_rows // 4) * 4, -(-num_columns // LANES) * LANES)
        room[:num_rows, :num_columns] = self.random.normal(size=self.size)
        return room

    def rows(self):
        """No room is needed: each number is read by itself."""
        return self.random.normal(size=self.size[0]).astype(self.dtype)

    def columns(self):
        room = self.zeros(-(-self.size[1] // LANES) * LANES)
        room[: self.size[1]] = self.random.normal(size=self.size[1])
        return room

    def zeros(self, *shape):
        return np.zeros(shape, self.dtype)

    def empty(self, like):
        return np.full_like(like, np.nan)

    def own(self, room):
        """What belongs to rows and columns, in float64."""
        return room[: self.size[0], : self.size[1]].astype(float)


def assert_close(found, wanted, dtype):
    tolerance = TOLERANCE[dtype] * (1 + np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


@dtypes
@sizes
@pytest.mark.parametrize("in_place", [False, True])
def test_corrections(num_rows, num_columns, dtype, in_place):
    room = Room(num_rows, num_columns, dtype)
    memory, key, value, beta = room.memory(), room.rows(), room.columns(), dtype(1.3)
    before = room.own(memory)
    for function, target in ((correct, 0 * value), (correct_to, value)):
        given = memory.copy()
        out, error = given if in_place else room.zeros(*memory.shape), room.empty(value)
        function(out, error, given, key, beta, value)
        wanted = key.astype(float) @ before - target[:num_columns]
        assert_close(error[:num_columns], wanted, dtype)
        assert_close(room.own(out), before - float(beta) * np.outer(key, wanted), dtype)
        # Zeros stay behind, for what follows.
        assert not error[num_columns:].any()
        assert not out[:, num_columns:].any() and not out[num_rows:].any()


@dtypes
@sizes
def test_decay_and_write(num_rows, num_columns, dtype):
    room = Room(num_rows, num_columns, dtype)
    memory, row, column = room.memory(), room.rows(), room.columns()
    before = room.own(memory)
    decay_and_write(memory, memory, dtype(0.7), dtype(0.4), row, column)
    wanted = 0.7 * before + 0.4 * np.outer(row, column[:num_columns].astype(float))
    assert_close(room.own(memory), wanted, dtype)
    assert not memory[:, num_columns:].any() and not memory[num_rows:].any()


@dtypes
@sizes
def test_sums_over_rows_and_over_columns(num_rows, num_columns, dtype):
    room = Room(num_rows, num_columns, dtype)
    memory, other, rows = room.memory(), room.memory(), room.rows()
    along, others = room.columns(), room.columns()
    by_column = room.empty(along)
    by_row, by_both = (room.zeros(len(memory)) for _ in range(2))
    memory[num_rows:] = np.nan  # sums over rows do not read them, others do not mix them
    reduce(by_column, by_row, by_both, memory, other, rows, along, others)
    a, b = room.own(memory), room.own(other)
    x, y = (v[:num_columns].astype(float) for v in (along, others))
    assert_close(by_column[:num_columns], rows.astype(float) @ a, dtype)
    assert not by_column[num_columns:].any()
    assert_close(by_row[:num_rows], a @ x, dtype)
    assert_close(by_both[:num_rows], a @ x + b @ y, dtype)


@dtypes
@sizes
def test_sums_over_everything(num_rows, num_columns, dtype):
    room = Room(num_rows, num_columns, dtype)
    memory, other, a, b = room.memory(), room.memory(), room.rows(), room.rows()
    other[num_rows:] = np.nan
    out = room.zeros(2)
    add_up(out, a, b, memory[:num_rows], other)
    wanted = [a.astype(float) @ b, (room.own(memory) * room.own(other)).sum()]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE[dtype] * 10 * num_rows)


@dtypes
@pytest.mark.parametrize("count", [1, 7, 16, 17, 40])
def test_mix(count, dtype):
    room = Room(count, 1, dtype)
    x, y, out = room.rows(), room.rows(), room.zeros(count + 1)
    mix(out[:count], x, dtype(0.5), y, dtype(-2))
    assert_close(out[:count], 0.5 * x.astype(float) - 2 * y.astype(float), dtype)
    assert out[count] == 0
    mix(x, x, dtype(0.5), y, dtype(-2))
    np.testing.assert_array_equal(x, out[:count])
