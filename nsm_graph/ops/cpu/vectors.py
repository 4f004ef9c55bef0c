"""Vector code for Numba kernels, as LLVM instructions: what loops over channels compile to badly.

Rows have any number of channels: whole vectors of 64 bytes, then a masked rest. A processor with
shorter vectors does each of them in several steps.

Legend: arrays are ``[rows, heads, channels]``; an index array names rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nsm_graph.ops.cpu import llvm

#: Rows that :func:`dots` multiplies at once: four sums are added up across their lanes together.
DOTS = 4

#: Numbers that every vector is a divisor of.
LANES = 16


@intrinsic
def dots(typing: Any, out: Any, to: Any, a: Any, row: Any, head: Any, b: Any, index: Any,
         first: Any, last: Any) -> Any:  # fmt: skip
    """``out[to + i] = a[row, head] . b[index[first + i], head]`` for i = 0..3.

    Beyond ``last`` the edge at ``last`` is taken again: ``out`` needs room for whole fours.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_to, v_a, v_row, v_head, v_b, v_index, v_first, v_last = args
        element = context.get_data_type(a.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        zero = ir.Constant(v_row.type, 0)
        mine = llvm.address(context, builder, a, v_a, v_row, v_head, zero)
        others = []
        for i in range(DOTS):
            edge = builder.add(v_first, ir.Constant(zero.type, i))
            edge = builder.select(builder.icmp_signed("<", edge, v_last), edge, v_last)
            other = builder.load(llvm.address(context, builder, index, v_index, edge))
            other = llvm.word(builder, other, zero)
            others.append(llvm.address(context, builder, b, v_b, other, v_head, zero))
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in others]

        def body(channel: Any, mask: Any) -> None:
            x = llvm.load(builder, builder.gep(mine, [channel]), vector, mask)
            for total, address in zip(sums, others, strict=True):
                y = llvm.load(builder, builder.gep(address, [channel]), vector, mask)
                llvm.multiply_add(builder, total, x, y)

        llvm.over(builder, llvm.num_channels(context, builder, a, v_a), vector, body)
        result = llvm.across(builder, [builder.load(total) for total in sums], vector)
        llvm.store(builder, result, llvm.address(context, builder, out, v_out, v_to))
        return context.get_dummy_value()

    return types.void(out, llvm.INT, a, llvm.INT, llvm.INT, b, index, llvm.INT, llvm.INT), generate


@intrinsic
def weighted_sum(typing: Any, out: Any, row: Any, head: Any, x: Any, index: Any, weights: Any,
                 perm: Any, first: Any, count: Any, factor: Any) -> Any:  # fmt: skip
    """``out[row, head] = factor * sum_p weights[perm[p], head] * x[index[p], head]``.

    p runs over ``count`` edges from ``first`` on; the sum stays in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_row, v_head, v_x, v_index, v_weights, v_perm, v_first, v_count, v_factor = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        zero = ir.Constant(v_row.type, 0)
        target = llvm.address(context, builder, out, v_out, v_row, v_head, zero)
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, None))

        def body(channel: Any, mask: Any) -> None:
            builder.store(ir.Constant(vector, None), total)
            with cgutils.for_range(builder, v_count) as loop:
                p = builder.add(v_first, loop.index)
                other = builder.load(llvm.address(context, builder, index, v_index, p))
                edge = builder.load(llvm.address(context, builder, perm, v_perm, p))
                edge = llvm.word(builder, edge, zero)
                weight = llvm.address(context, builder, weights, v_weights, edge, v_head)
                other = llvm.word(builder, other, zero)
                source = llvm.address(context, builder, x, v_x, other, v_head, channel)
                rows = llvm.load(builder, source, vector, mask)
                llvm.multiply_add(
                    builder, total, llvm.splat(builder, vector, builder.load(weight)), rows
                )
            result = builder.fmul(builder.load(total), llvm.splat(builder, vector, v_factor))
            llvm.store(builder, result, builder.gep(target, [channel]), mask)

        llvm.over(builder, llvm.num_channels(context, builder, x, v_x), vector, body)
        return context.get_dummy_value()

    signature = (out, llvm.INT, llvm.INT, x, index, weights, perm, llvm.INT, llvm.INT, out.dtype)
    return types.void(*signature), generate


@intrinsic
def softmax(typing: Any, scores: Any, first: Any, count: Any) -> Any:
    """Softmax of ``count`` numbers from ``first`` on, in place; -inf is absent, all absent zeros.

    Writes whole vectors: what follows, up to the next multiple of ``LANES``, is overwritten.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_scores, v_first, v_count = args
        element = context.get_data_type(scores.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        start = llvm.address(context, builder, scores, v_scores, v_first)
        absent, zeros = ir.Constant(vector, [-np.inf] * vector.count), ir.Constant(vector, None)
        best, total = (cgutils.alloca_once_value(builder, x) for x in (absent, zeros))

        def greater(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def add(a: Any, b: Any) -> Any:
            return builder.fadd(a, b, flags=llvm.FAST)

        def find_highest(place: Any, mask: Any) -> None:
            address = builder.gep(start, [place])
            x = llvm.load(builder, address, vector)
            if mask is not None:
                x = builder.select(mask, x, absent)
                llvm.store(builder, x, address)
            builder.store(greater(x, builder.load(best)), best)

        llvm.over(builder, v_count, vector, find_highest)
        top = llvm.fold(builder, builder.load(best), greater)
        is_present = builder.fcmp_unordered("!=", top, ir.Constant(element, -np.inf))
        top = builder.select(is_present, top, ir.Constant(element, 0.0))

        def exponentiate(place: Any, mask: Any) -> None:
            address = builder.gep(start, [place])
            x = llvm.load(builder, address, vector)
            power = llvm.weight(builder, builder.fsub(x, llvm.splat(builder, vector, top)))
            llvm.store(builder, power, address)
            builder.store(add(builder.load(total), power), total)

        llvm.over(builder, v_count, vector, exponentiate)
        mass = llvm.fold(builder, builder.load(total), add)
        is_empty = builder.fcmp_ordered("==", mass, ir.Constant(element, 0.0))
        share = builder.fdiv(ir.Constant(element, 1.0), mass)
        share = builder.select(is_empty, ir.Constant(element, 0.0), share)

        def divide(place: Any, mask: Any) -> None:
            address = builder.gep(start, [place])
            x = llvm.load(builder, address, vector)
            llvm.store(builder, builder.fmul(x, llvm.splat(builder, vector, share)), address)

        llvm.over(builder, v_count, vector, divide)
        return context.get_dummy_value()

    return types.void(scores, llvm.INT, llvm.INT), generate


def _make_short_softmax(width: int) -> Any:
    @intrinsic
    def softmax(typing: Any, scores: Any, count: Any) -> Any:
        """Softmax of each ``width`` of the first ``count`` numbers, in place, vector by vector.

        -inf is absent, all absent zeros. What follows up to the next whole vector is overwritten.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v_scores, v_count = args
            element = context.get_data_type(scores.dtype)
            vector = ir.VectorType(element, llvm.lanes(element))
            zeros = ir.Constant(vector, None)
            absent = ir.Constant(vector, [-np.inf] * vector.count)

            def greater(a: Any, b: Any) -> Any:
                return builder.select(builder.fcmp_ordered(">", a, b), a, b)

            def add(a: Any, b: Any) -> Any:
                return builder.fadd(a, b, flags=llvm.FAST)

            step = ir.Constant(v_count.type, vector.count)
            zero = ir.Constant(v_count.type, 0)
            with cgutils.for_range_slice(builder, zero, v_count, step, inc=True) as (place, _):
                address = llvm.address(context, builder, scores, v_scores, place)
                x = llvm.load(builder, address, vector)
                top = llvm.fold_groups(builder, x, greater, width)
                is_absent = builder.fcmp_ordered("==", top, absent)
                top = builder.select(is_absent, zeros, top)
                power = llvm.weight(builder, builder.fsub(x, top))
                mass = llvm.fold_groups(builder, power, add, width)
                is_empty = builder.fcmp_ordered("==", mass, zeros)
                share = builder.fdiv(power, mass)
                llvm.store(builder, builder.select(is_empty, zeros, share), address)
            return context.get_dummy_value()

        return types.void(scores, llvm.INT), generate

    return softmax


softmax4, softmax8 = (_make_short_softmax(width) for width in (4, 8))


def _make_elementwise(function: Any, text: str) -> Any:
    @intrinsic
    def elementwise(typing: Any, x: Any, row: Any, first: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v_x, v_row, v_first, v_count = args
            element = context.get_data_type(x.dtype)
            vector = ir.VectorType(element, llvm.lanes(element))
            start = llvm.address(context, builder, x, v_x, v_row, v_first)

            def body(place: Any, mask: Any) -> None:
                address = builder.gep(start, [place])
                value = function(builder, llvm.load(builder, address, vector, mask))
                llvm.store(builder, value, address, mask)

            llvm.over(builder, v_count, vector, body)
            return context.get_dummy_value()

        return types.void(x, llvm.INT, llvm.INT, llvm.INT), generate

    elementwise.__doc__ = text
    return elementwise


def _sigmoid(builder: Any, x: Any) -> Any:
    one = ir.Constant(x.type, [1.0] * x.type.count)
    power = llvm.exp(builder, builder.fneg(x))
    return builder.fdiv(one, builder.fadd(one, power))


def _tanh(builder: Any, x: Any) -> Any:
    one, two = (ir.Constant(x.type, [value] * x.type.count) for value in (1.0, 2.0))
    power = llvm.exp(builder, builder.fmul(x, two))
    return builder.fsub(one, builder.fdiv(two, builder.fadd(one, power)))


sigmoid = _make_elementwise(_sigmoid, "Sigmoid of ``x[row, first:first + count]``, in place.")
tanh = _make_elementwise(_tanh, "tanh of ``x[row, first:first + count]``, in place.")


@intrinsic
def softmax_columns(typing: Any, x: Any) -> Any:
    """Softmax down the rows of a matrix, in place: every lane is a column of its own."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (v_x,) = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        view = context.make_array(x)(context, builder, v_x)
        num_rows, num_columns = cgutils.unpack_tuple(builder, view.shape, 2)
        zeros = ir.Constant(vector, None)
        highest, total = (cgutils.alloca_once_value(builder, zeros) for _ in range(2))

        def columns(first: Any, mask: Any) -> None:
            def at(row: Any) -> Any:
                return llvm.address(context, builder, x, v_x, row, first)

            top = llvm.load(builder, at(ir.Constant(num_rows.type, 0)), vector, mask)
            builder.store(top, highest)
            with cgutils.for_range(builder, num_rows) as loop:
                value, best = (
                    llvm.load(builder, at(loop.index), vector, mask),
                    builder.load(highest),
                )
                is_more = builder.fcmp_ordered(">", value, best)
                builder.store(builder.select(is_more, value, best), highest)
            builder.store(zeros, total)
            with cgutils.for_range(builder, num_rows) as loop:
                value = llvm.load(builder, at(loop.index), vector, mask)
                power = llvm.weight(builder, builder.fsub(value, builder.load(highest)))
                llvm.store(builder, power, at(loop.index), mask)
                builder.store(builder.fadd(builder.load(total), power, flags=llvm.FAST), total)
            one = ir.Constant(vector, [1.0] * vector.count)
            share = builder.fdiv(one, builder.load(total))
            with cgutils.for_range(builder, num_rows) as loop:
                value = llvm.load(builder, at(loop.index), vector, mask)
                llvm.store(builder, builder.fmul(value, share), at(loop.index), mask)

        with builder.if_then(builder.icmp_signed(">", num_rows, ir.Constant(num_rows.type, 0))):
            llvm.over(builder, num_columns, vector, columns)
        return context.get_dummy_value()

    return types.void(x), generate


@intrinsic
def softmax_columns_backward(typing: Any, grad: Any, weights: Any) -> Any:
    """``grad = weights * (grad - sum over rows of weights * grad)``, in place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_grad, v_weights = args
        element = context.get_data_type(grad.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        view = context.make_array(grad)(context, builder, v_grad)
        num_rows, num_columns = cgutils.unpack_tuple(builder, view.shape, 2)
        zeros = ir.Constant(vector, None)
        total = cgutils.alloca_once_value(builder, zeros)

        def columns(first: Any, mask: Any) -> None:
            def pair(row: Any) -> tuple[Any, Any, Any]:
                at = llvm.address(context, builder, grad, v_grad, row, first)
                other = llvm.address(context, builder, weights, v_weights, row, first)
                return (
                    at,
                    llvm.load(builder, at, vector, mask),
                    llvm.load(builder, other, vector, mask),
                )

            builder.store(zeros, total)
            with cgutils.for_range(builder, num_rows) as loop:
                _, slope, weight = pair(loop.index)
                llvm.multiply_add(builder, total, slope, weight)
            with cgutils.for_range(builder, num_rows) as loop:
                at, slope, weight = pair(loop.index)
                slope = builder.fsub(slope, builder.load(total))
                llvm.store(builder, builder.fmul(weight, slope), at, mask)

        llvm.over(builder, num_columns, vector, columns)
        return context.get_dummy_value()

    return types.void(grad, weights), generate


@intrinsic
def transpose(typing: Any, out: Any, x: Any) -> Any:
    """``out = x'``, by square blocks that are turned in registers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_x = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        size = vector.count
        num_rows, num_columns = cgutils.unpack_tuple(
            builder, context.make_array(x)(context, builder, v_x).shape, 2
        )

        def constant(value: int) -> Any:
            return ir.Constant(num_rows.type, value)

        def block(kind: Any, array: Any, row: Any, column: Any, mask: Any, bound: Any) -> list:
            """Addresses and masks of the rows of a block; rows beyond ``bound`` have no lane."""
            places = []
            for i in range(size):
                at = builder.add(row, constant(i))
                own = mask
                if bound is not None:
                    is_there = builder.icmp_signed("<", at, bound)
                    lanes = ir.VectorType(ir.IntType(1), size)
                    own = builder.and_(llvm.splat(builder, lanes, is_there), mask)
                places.append((llvm.address(context, builder, kind, array, at, column), own))
            return places

        def turn(row: Any, column: Any, row_mask: Any, column_mask: Any) -> None:
            is_whole = row_mask is None
            rows = [
                llvm.load(builder, address, vector, mask)
                for address, mask in block(
                    x, v_x, row, column, column_mask, None if is_whole else num_rows
                )
            ]
            half = size // 2
            while half > 0:
                low = [i if i & half == 0 else size + i - half for i in range(size)]
                high = [i + half if i & half == 0 else size + i for i in range(size)]
                for i in range(size):
                    if i & half == 0:
                        a, b = rows[i], rows[i + half]
                        rows[i], rows[i + half] = (
                            builder.shuffle_vector(
                                a, b, ir.Constant(ir.VectorType(llvm.I32, size), lanes)
                            )
                            for lanes in (low, high)
                        )
                half //= 2
            targets = block(out, v_out, column, row, row_mask, None if is_whole else num_columns)
            for value, (address, mask) in zip(rows, targets, strict=True):
                llvm.store(builder, value, address, mask)

        step = constant(size)
        with cgutils.for_range(
            builder, builder.sdiv(_round_up(builder, num_rows, step), step)
        ) as i:
            row = builder.mul(i.index, step)
            whole_rows = builder.icmp_signed("<=", builder.add(row, step), num_rows)
            num_blocks = builder.sdiv(_round_up(builder, num_columns, step), step)
            with cgutils.for_range(builder, num_blocks) as j:
                column = builder.mul(j.index, step)
                whole_columns = builder.icmp_signed("<=", builder.add(column, step), num_columns)
                with builder.if_else(builder.and_(whole_rows, whole_columns)) as (whole, rest):
                    with whole:
                        turn(row, column, None, None)
                    with rest:
                        row_mask = llvm.mask(builder, vector, builder.sub(num_rows, row))
                        column_mask = llvm.mask(builder, vector, builder.sub(num_columns, column))
                        turn(row, column, row_mask, column_mask)
        return context.get_dummy_value()

    return types.void(out, x), generate


@intrinsic
def write_past(typing: Any, out: Any, place: Any, x: Any) -> Any:
    """``out[place:place + len(x)] = x``, past the cache where ``place`` begins a vector.

    ``out`` begins at a cache line, as torch's memory does. Other threads see it after `settle`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_place, v_x = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, llvm.lanes(element))
        count = cgutils.unpack_tuple(builder, context.make_array(x)(context, builder, v_x).shape, 1)
        source = llvm.address(context, builder, x, v_x, ir.Constant(v_place.type, 0))
        target = llvm.address(context, builder, out, v_out, v_place)
        rest = builder.and_(v_place, ir.Constant(v_place.type, vector.count - 1))
        is_aligned = builder.icmp_signed("==", rest, ir.Constant(v_place.type, 0))

        def copy(is_past: bool) -> None:
            def body(at: Any, mask: Any) -> None:
                value = llvm.load(builder, builder.gep(source, [at]), vector, mask)
                address = builder.gep(target, [at])
                if is_past and mask is None:
                    llvm.store_past(builder, value, address)
                else:
                    llvm.store(builder, value, address, mask)

            llvm.over(builder, count[0], vector, body)

        with builder.if_else(is_aligned) as (past, through):
            with past:
                copy(True)
            with through:
                copy(False)
        return context.get_dummy_value()

    return types.void(out, llvm.INT, x), generate


@intrinsic
def settle(typing: Any) -> Any:
    """Ends what was written past the cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _round_up(builder: Any, count: Any, step: Any) -> Any:
    return builder.add(count, builder.sub(step, ir.Constant(count.type, 1)))
