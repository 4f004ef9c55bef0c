"""What a scan does to a memory, as LLVM instructions: every lane is a column of its own.

A memory has P rows of whole vectors: columns are filled up with zeros to a multiple of
:data:`~nsm_graph.ops.cpu.vectors.LANES`, and its room has a multiple of :data:`ROWS` rows, of which
those beyond P hold anything. Vectors of rows or columns have as much room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nsm_graph.ops.cpu import llvm

#: Rows whose sums across lanes are added up together.
ROWS = 4


class _Memory:
    """A matrix in a kernel: vectors at a row and a column."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        self.context, self.builder, self.kind, self.value = context, builder, kind, value
        element = context.get_data_type(kind.dtype)
        self.vector = ir.VectorType(element, llvm.lanes(element))
        view = context.make_array(kind)(context, builder, value)
        self.num_rows, self.num_columns = cgutils.unpack_tuple(builder, view.shape, 2)

    def at(self, row: Any, column: Any) -> Any:
        return llvm.address(self.context, self.builder, self.kind, self.value, row, column)

    def load(self, row: Any, column: Any) -> Any:
        return llvm.load(self.builder, self.at(row, column), self.vector)

    def store(self, value: Any, row: Any, column: Any) -> None:
        llvm.store(self.builder, value, self.at(row, column))


class _Numbers:
    """A row of numbers in a kernel: single ones in all lanes, or vectors."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        self.context, self.builder, self.kind, self.value = context, builder, kind, value
        element = context.get_data_type(kind.dtype)
        self.vector = ir.VectorType(element, llvm.lanes(element))
        view = context.make_array(kind)(context, builder, value)
        (self.count,) = cgutils.unpack_tuple(builder, view.shape, 1)

    def at(self, place: Any) -> Any:
        return llvm.address(self.context, self.builder, self.kind, self.value, place)

    def splat(self, place: Any) -> Any:
        return llvm.splat(self.builder, self.vector, self.builder.load(self.at(place)))

    def load(self, place: Any) -> Any:
        return llvm.load(self.builder, self.at(place), self.vector)

    def store(self, value: Any, place: Any) -> None:
        llvm.store(self.builder, value, self.at(place))


def _over_columns(builder: Any, count: Any, vector: ir.VectorType, body: Callable) -> None:
    """Calls ``body(first column)`` for each vector of columns."""
    zero, step = (ir.Constant(count.type, value) for value in (0, vector.count))
    with cgutils.for_range_slice(builder, zero, count, step, inc=True) as (column, _):
        body(column)


def _over_rows(builder: Any, count: Any, body: Callable) -> None:
    """Calls ``body(row, chain)``: four rows at a time, each with a chain of sums of its own."""
    four = ir.Constant(count.type, ROWS)
    num_fours = builder.udiv(count, four)
    with cgutils.for_range(builder, num_fours) as loop:
        first = builder.mul(loop.index, four)
        for chain in range(ROWS):
            body(builder.add(first, ir.Constant(count.type, chain)), chain)
    done = builder.mul(num_fours, four)
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        body(builder.add(done, loop.index), 0)


def _weighted_rows(builder: Any, memory: _Memory, weights: _Numbers, column: Any) -> Any:
    """``sum_p weights[p] memory[p, column:]``, in four chains that do not wait for each other."""
    zeros = ir.Constant(memory.vector, None)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(ROWS)]
    for total in sums:
        builder.store(zeros, total)

    def add(row: Any, chain: int) -> None:
        llvm.multiply_add(builder, sums[chain], weights.splat(row), memory.load(row, column))

    _over_rows(builder, weights.count, add)
    a, b, c, d = (builder.load(total) for total in sums)
    pairs = (builder.fadd(x, y, flags=llvm.FAST) for x, y in ((a, b), (c, d)))
    return builder.fadd(*pairs, flags=llvm.FAST)


def _make_correct(has_value: bool) -> Any:
    @intrinsic
    def correct(typing: Any, out: Any, error: Any, memory: Any, key: Any, beta: Any,
                value: Any) -> Any:  # fmt: skip
        """``error = key' memory - value`` and ``out = memory - beta key error``."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v_out, v_error, v_memory, v_key, v_beta, v_value = args
            before = _Memory(context, builder, memory, v_memory)
            after = _Memory(context, builder, out, v_out)
            errors = _Numbers(context, builder, error, v_error)
            keys = _Numbers(context, builder, key, v_key)
            values = _Numbers(context, builder, value, v_value)
            factor = llvm.splat(builder, before.vector, v_beta)

            def columns(column: Any) -> None:
                found = _weighted_rows(builder, before, keys, column)
                if has_value:
                    found = builder.fsub(found, values.load(column), flags=llvm.FAST)
                errors.store(found, column)
                step = builder.fmul(found, factor, flags=llvm.FAST)

                def subtract(row: Any, _: int) -> None:
                    part = builder.fmul(keys.splat(row), step, flags=llvm.FAST)
                    rest = builder.fsub(before.load(row, column), part, flags=llvm.FAST)
                    after.store(rest, row, column)

                _over_rows(builder, keys.count, subtract)

            _over_columns(builder, before.num_columns, before.vector, columns)
            return context.get_dummy_value()

        return types.void(out, error, memory, key, memory.dtype, value), generate

    return correct


#: To nothing: a correction that leaves ``(1 - beta)`` of what stands along the key.
correct = _make_correct(has_value=False)
#: To what the key should hold.
correct_to = _make_correct(has_value=True)


@intrinsic
def combine(typing: Any, out: Any, weights: Any, memory: Any) -> Any:
    """``out = weights' memory``, one number a column."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_weights, v_memory = args
        rows = _Memory(context, builder, memory, v_memory)
        target = _Numbers(context, builder, out, v_out)
        shares = _Numbers(context, builder, weights, v_weights)
        _over_columns(
            builder, rows.num_columns, rows.vector,
            lambda column: target.store(_weighted_rows(builder, rows, shares, column), column),
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(out, weights, memory), generate


def _contract(context: Any, builder: Any, out: _Numbers, pairs: list) -> None:
    """``out = sum over pairs of matrix numbers``, one number a row."""
    matrix = pairs[0][0]
    zeros = ir.Constant(matrix.vector, None)
    sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(ROWS)]
    four = ir.Constant(matrix.num_rows.type, ROWS)
    zero = ir.Constant(four.type, 0)
    with cgutils.for_range_slice(builder, zero, matrix.num_rows, four, inc=True) as (first, _):
        for total in sums:
            builder.store(zeros, total)

        def add(column: Any) -> None:
            for rows, numbers in pairs:
                along = numbers.load(column)
                for i, total in enumerate(sums):
                    row = builder.add(first, ir.Constant(four.type, i))
                    llvm.multiply_add(builder, total, rows.load(row, column), along)

        _over_columns(builder, matrix.num_columns, matrix.vector, add)
        totals = llvm.across(builder, [builder.load(total) for total in sums], matrix.vector)
        llvm.store(builder, totals, out.at(first))


@intrinsic
def contract(typing: Any, out: Any, memory: Any, numbers: Any) -> Any:
    """``out = memory numbers``, one number a row."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_memory, v_numbers = args
        rows = _Memory(context, builder, memory, v_memory)
        along = _Numbers(context, builder, numbers, v_numbers)
        _contract(context, builder, _Numbers(context, builder, out, v_out), [(rows, along)])
        return context.get_dummy_value()

    return types.void(out, memory, numbers), generate


@intrinsic
def contract_both(typing: Any, out: Any, memory: Any, numbers: Any, other: Any,
                  its_numbers: Any) -> Any:  # fmt: skip
    """``out = memory numbers + other its_numbers``, one number a row."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_memory, v_numbers, v_other, v_its_numbers = args
        pairs = [
            (_Memory(context, builder, rows, v_rows), _Numbers(context, builder, along, v_along))
            for rows, v_rows, along, v_along in (
                (memory, v_memory, numbers, v_numbers),
                (other, v_other, its_numbers, v_its_numbers),
            )
        ]
        _contract(context, builder, _Numbers(context, builder, out, v_out), pairs)
        return context.get_dummy_value()

    return types.void(out, memory, numbers, other, its_numbers), generate


@intrinsic
def decay_and_write(typing: Any, out: Any, memory: Any, decay: Any, share: Any, row: Any,
                    column: Any) -> Any:  # fmt: skip
    """``out = decay memory + share row column'``; ``row`` has one number a row."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_memory, v_decay, v_share, v_row, v_column = args
        before = _Memory(context, builder, memory, v_memory)
        after = _Memory(context, builder, out, v_out)
        rows = _Numbers(context, builder, row, v_row)
        along = _Numbers(context, builder, column, v_column)
        kept = llvm.splat(builder, before.vector, v_decay)
        factor = llvm.splat(builder, before.vector, v_share)

        def columns(first: Any) -> None:
            written = builder.fmul(along.load(first), factor, flags=llvm.FAST)

            def write(place: Any, _: int) -> None:
                rest = builder.fmul(before.load(place, first), kept, flags=llvm.FAST)
                new = builder.fmul(rows.splat(place), written, flags=llvm.FAST)
                after.store(builder.fadd(rest, new, flags=llvm.FAST), place, first)

            _over_rows(builder, rows.count, write)

        _over_columns(builder, before.num_columns, before.vector, columns)
        return context.get_dummy_value()

    return types.void(out, memory, memory.dtype, memory.dtype, row, column), generate


def _sum_of_products(context: Any, builder: Any, count: Any, load: Callable,
                     vector: ir.VectorType) -> Any:  # fmt: skip
    """Over ``count`` numbers in whole vectors and a masked rest."""
    zeros = ir.Constant(vector, None)
    total = cgutils.alloca_once_value(builder, zeros)
    builder.store(zeros, total)

    def add(place: Any, mask: Any) -> None:
        llvm.multiply_add(builder, total, *load(place, mask))

    llvm.over(builder, count, vector, add)
    return llvm.fold(builder, builder.load(total), lambda a, b: builder.fadd(a, b, flags=llvm.FAST))


@intrinsic
def dot(typing: Any, a: Any, b: Any) -> Any:
    """``a . b`` of two rows of numbers, as many as the first has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        own, other = (
            _Numbers(context, builder, kind, value)
            for kind, value in zip((a, b), args, strict=True)
        )

        def load(place: Any, mask: Any) -> list:
            return [llvm.load(builder, x.at(place), x.vector, mask) for x in (own, other)]

        return _sum_of_products(context, builder, own.count, load, own.vector)

    return a.dtype(a, b), generate


@intrinsic
def inner(typing: Any, a: Any, b: Any) -> Any:
    """The sum of the products of two memories' numbers, of as many rows as the first has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        own, other = (
            _Memory(context, builder, kind, value) for kind, value in zip((a, b), args, strict=True)
        )
        zeros = ir.Constant(own.vector, None)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(ROWS)]
        for total in sums:
            builder.store(zeros, total)

        def columns(column: Any) -> None:
            def add(row: Any, chain: int) -> None:
                pair = own.load(row, column), other.load(row, column)
                llvm.multiply_add(builder, sums[chain], *pair)

            _over_rows(builder, own.num_rows, add)

        def plus(x: Any, y: Any) -> Any:
            return builder.fadd(x, y, flags=llvm.FAST)

        _over_columns(builder, own.num_columns, own.vector, columns)
        w, x, y, z = (builder.load(total) for total in sums)
        return llvm.fold(builder, plus(plus(w, x), plus(y, z)), plus)

    return a.dtype(a, b), generate


@intrinsic
def mix(typing: Any, out: Any, x: Any, factor: Any, y: Any, other: Any) -> Any:
    """``out = factor x + other y`` of rows of numbers, as many as the target has."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_x, v_factor, v_y, v_other = args
        target, first, second = (
            _Numbers(context, builder, kind, value)
            for kind, value in ((out, v_out), (x, v_x), (y, v_y))
        )
        factors = [llvm.splat(builder, target.vector, value) for value in (v_factor, v_other)]

        def body(place: Any, mask: Any) -> None:
            parts = (
                builder.fmul(llvm.load(builder, row.at(place), row.vector, mask), scale,
                             flags=llvm.FAST)
                for row, scale in zip((first, second), factors, strict=True)
            )  # fmt: skip
            llvm.store(builder, builder.fadd(*parts, flags=llvm.FAST), target.at(place), mask)

        llvm.over(builder, target.count, target.vector, body)
        return context.get_dummy_value()

    return types.void(out, x, out.dtype, y, out.dtype), generate
