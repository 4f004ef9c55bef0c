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

#: Rows that :func:`dots` multiplies at once: four sums are added up across their lanes together.
DOTS = 4

#: Numbers that every vector is a divisor of.
LANES = 16

_INT = types.intp
_I32 = ir.IntType(32)
_FAST = ("reassoc", "contract", "arcp", "nsz")


# Pieces of LLVM ####################################################################


def _lanes(element: ir.Type) -> int:
    return 16 if isinstance(element, ir.FloatType) else 8


def _address(context: Any, builder: Any, kind: Any, array: Any, *index: Any) -> Any:
    view = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, view, list(index))


def _num_channels(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return builder.extract_value(context.make_array(kind)(context, builder, array).shape, 2)


def _word(builder: Any, value: Any, like: Any) -> Any:
    """An index of any width as a machine word."""
    return value if value.type == like.type else builder.sext(value, like.type)


def _suffix(vector: ir.VectorType) -> str:
    return f"v{vector.count}{'f32' if isinstance(vector.element, ir.FloatType) else 'f64'}"


def _mask(builder: Any, vector: ir.VectorType, left: Any) -> Any:
    """Lanes below ``left``."""
    lanes = ir.VectorType(_I32, vector.count)
    left = builder.trunc(left, _I32)
    steps = ir.Constant(lanes, list(range(vector.count)))
    return builder.icmp_signed("<", steps, _splat(builder, lanes, left))


def _splat(builder: Any, vector: ir.VectorType, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    order = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), order)


def _load(builder: Any, address: Any, vector: ir.VectorType, mask: Any = None) -> Any:
    size = 4 if isinstance(vector.element, ir.FloatType) else 8
    address = builder.bitcast(address, vector.as_pointer())
    if mask is None:
        return builder.load(address, align=size)
    kind = ir.FunctionType(vector, [address.type, _I32, mask.type, vector])
    name = f"llvm.masked.load.{_suffix(vector)}.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    zeros = ir.Constant(vector, None)
    return builder.call(function, [address, ir.Constant(_I32, size), mask, zeros])


def _store(builder: Any, value: Any, address: Any, mask: Any = None) -> None:
    vector = value.type
    size = 4 if isinstance(vector.element, ir.FloatType) else 8
    address = builder.bitcast(address, vector.as_pointer())
    if mask is None:
        builder.store(value, address, align=size)
        return
    kind = ir.FunctionType(ir.VoidType(), [vector, address.type, _I32, mask.type])
    name = f"llvm.masked.store.{_suffix(vector)}.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(function, [value, address, ir.Constant(_I32, size), mask])


def _multiply_add(builder: Any, total: Any, a: Any, b: Any) -> None:
    """``total += a * b``, where ``total`` is a place on the stack."""
    product = builder.fmul(a, b, flags=_FAST)
    builder.store(builder.fadd(builder.load(total), product, flags=_FAST), total)


def _over(builder: Any, count: Any, vector: ir.VectorType, body: Any) -> None:
    """Calls ``body(first, mask)`` for each whole vector of ``count`` numbers, then for the rest."""
    step = ir.Constant(count.type, vector.count)
    num_whole = builder.udiv(count, step)
    with cgutils.for_range(builder, num_whole) as loop:
        body(builder.mul(loop.index, step), None)
    done = builder.mul(num_whole, step)
    left = builder.sub(count, done)
    with builder.if_then(builder.icmp_signed(">", left, ir.Constant(left.type, 0))):
        body(done, _mask(builder, vector, left))


def _fold(builder: Any, vector: Any, combine: Any) -> Any:
    """All lanes combined into one number, half with half."""
    width = vector.type.count
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, width), lanes))
            for lanes in (list(range(width)), list(range(width, 2 * width)))
        )
        vector = combine(low, high)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _exp(builder: Any, x: Any) -> Any:
    """exp(x) lane by lane; in float32 within two units in the last place, cut off at -87 and 88."""
    vector = x.type
    if not isinstance(vector.element, ir.FloatType):
        return _each_lane(builder, "exp", x)

    def constant(value: float) -> Any:
        return ir.Constant(vector, [value] * vector.count)

    def add(a: Any, b: Any) -> Any:
        return builder.fadd(a, b, flags=_FAST)

    def multiply(a: Any, b: Any) -> Any:
        return builder.fmul(a, b, flags=_FAST)

    # 2^n exp(r) with |r| <= log(2) / 2. log(2) comes in two parts, of which n times the first is
    # exact; coefficients as in Cephes. A comparison that NaN fails keeps NaN.
    least, most = constant(-87.0), constant(88.0)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
    n = _each_lane(builder, "floor", add(multiply(x, constant(1.44269504)), constant(0.5)))
    r = add(x, multiply(n, constant(-0.693359375)))
    r = add(r, multiply(n, constant(2.12194440e-4)))
    p = constant(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = add(multiply(p, r), constant(term))
    p = add(add(multiply(multiply(p, r), r), r), constant(1.0))
    whole = ir.VectorType(_I32, vector.count)

    def integer(value: int) -> Any:
        return ir.Constant(whole, [value] * vector.count)

    # NaN has no integer; the product is NaN all the same.
    n = builder.select(builder.fcmp_ordered("ord", n, n), n, constant(0.0))
    exponent = builder.add(builder.fptosi(n, whole), integer(127))
    return builder.fmul(p, builder.bitcast(builder.shl(exponent, integer(23)), vector))


def _weight(builder: Any, x: Any) -> Any:
    """exp(x) of a score below the highest; exactly 0 where it is next to the smallest number.

    Numbers smaller than that cost a hundred times as much to compute with.
    """
    vector = x.type
    least = -87.0 if isinstance(vector.element, ir.FloatType) else -708.0
    is_nothing = builder.fcmp_ordered("<", x, ir.Constant(vector, [least] * vector.count))
    return builder.select(is_nothing, ir.Constant(vector, None), _exp(builder, x))


def _each_lane(builder: Any, operation: str, x: Any) -> Any:
    kind = ir.FunctionType(x.type, [x.type])
    name = f"llvm.{operation}.{_suffix(x.type)}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [x])


def _across(builder: Any, sums: list, vector: ir.VectorType) -> Any:
    """Four vectors -> one of four lanes, which hold their totals."""

    def pick(x: Any, y: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def join(x: Any, y: Any, one: tuple, other: tuple) -> Any:
        # Within every four lanes, which is cheap; 0 to 3 are of x, 4 to 7 of y.
        def spread(four: tuple) -> list[int]:
            return [
                4 * block + lane % 4 + (vector.count if lane >= 4 else 0)
                for block in range(vector.count // 4)
                for lane in four
            ]

        return builder.fadd(pick(x, y, spread(one)), pick(x, y, spread(other)), flags=_FAST)

    a, b, c, d = sums
    ends = (0, 1, 4, 5), (2, 3, 6, 7)
    total = join(join(a, b, *ends), join(c, d, *ends), (0, 2, 4, 6), (1, 3, 5, 7))
    width = vector.count
    while width > 4:
        width //= 2
        low, high = list(range(width)), list(range(width, 2 * width))
        total = builder.fadd(pick(total, total, low), pick(total, total, high), flags=_FAST)
    return total


# What kernels call #################################################################


@intrinsic
def dots(typing: Any, out: Any, to: Any, a: Any, row: Any, head: Any, b: Any, index: Any,
         first: Any, last: Any) -> Any:  # fmt: skip
    """``out[to + i] = a[row, head] . b[index[first + i], head]`` for i = 0..3.

    Beyond ``last`` the edge at ``last`` is taken again: ``out`` needs room for whole fours.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_to, v_a, v_row, v_head, v_b, v_index, v_first, v_last = args
        element = context.get_data_type(a.dtype)
        vector = ir.VectorType(element, _lanes(element))
        zero = ir.Constant(v_row.type, 0)
        mine = _address(context, builder, a, v_a, v_row, v_head, zero)
        others = []
        for i in range(DOTS):
            edge = builder.add(v_first, ir.Constant(zero.type, i))
            edge = builder.select(builder.icmp_signed("<", edge, v_last), edge, v_last)
            other = builder.load(_address(context, builder, index, v_index, edge))
            other = _word(builder, other, zero)
            others.append(_address(context, builder, b, v_b, other, v_head, zero))
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in others]
        for total in sums:
            builder.store(ir.Constant(vector, None), total)

        def body(channel: Any, mask: Any) -> None:
            x = _load(builder, builder.gep(mine, [channel]), vector, mask)
            for total, address in zip(sums, others, strict=True):
                y = _load(builder, builder.gep(address, [channel]), vector, mask)
                _multiply_add(builder, total, x, y)

        _over(builder, _num_channels(context, builder, a, v_a), vector, body)
        result = _across(builder, [builder.load(total) for total in sums], vector)
        _store(builder, result, _address(context, builder, out, v_out, v_to))
        return context.get_dummy_value()

    return types.void(out, _INT, a, _INT, _INT, b, index, _INT, _INT), generate


@intrinsic
def weighted_sum(typing: Any, out: Any, row: Any, head: Any, x: Any, index: Any, weights: Any,
                 perm: Any, first: Any, count: Any, factor: Any) -> Any:  # fmt: skip
    """``out[row, head] = factor * sum_p weights[perm[p], head] * x[index[p], head]``.

    p runs over ``count`` edges from ``first`` on; the sum stays in registers.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_row, v_head, v_x, v_index, v_weights, v_perm, v_first, v_count, v_factor = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, _lanes(element))
        zero = ir.Constant(v_row.type, 0)
        target = _address(context, builder, out, v_out, v_row, v_head, zero)
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, None))

        def body(channel: Any, mask: Any) -> None:
            builder.store(ir.Constant(vector, None), total)
            with cgutils.for_range(builder, v_count) as loop:
                p = builder.add(v_first, loop.index)
                other = builder.load(_address(context, builder, index, v_index, p))
                edge = builder.load(_address(context, builder, perm, v_perm, p))
                edge = _word(builder, edge, zero)
                weight = builder.load(_address(context, builder, weights, v_weights, edge, v_head))
                other = _word(builder, other, zero)
                source = _address(context, builder, x, v_x, other, v_head, channel)
                rows = _load(builder, source, vector, mask)
                _multiply_add(builder, total, _splat(builder, vector, weight), rows)
            result = builder.fmul(builder.load(total), _splat(builder, vector, v_factor))
            _store(builder, result, builder.gep(target, [channel]), mask)

        _over(builder, _num_channels(context, builder, x, v_x), vector, body)
        return context.get_dummy_value()

    signature = (out, _INT, _INT, x, index, weights, perm, _INT, _INT, out.dtype)
    return types.void(*signature), generate


@intrinsic
def softmax(typing: Any, scores: Any, first: Any, count: Any) -> Any:
    """Softmax of ``count`` numbers from ``first`` on, in place; -inf is absent, all absent zeros.

    Writes whole vectors: what follows, up to the next multiple of ``LANES``, is overwritten.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_scores, v_first, v_count = args
        element = context.get_data_type(scores.dtype)
        vector = ir.VectorType(element, _lanes(element))
        start = _address(context, builder, scores, v_scores, v_first)
        absent, zeros = ir.Constant(vector, [-np.inf] * vector.count), ir.Constant(vector, None)
        best, total = (cgutils.alloca_once_value(builder, x) for x in (absent, zeros))
        builder.store(absent, best)
        builder.store(zeros, total)

        def greater(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def add(a: Any, b: Any) -> Any:
            return builder.fadd(a, b, flags=_FAST)

        def find_highest(place: Any, mask: Any) -> None:
            address = builder.gep(start, [place])
            x = _load(builder, address, vector)
            if mask is not None:
                x = builder.select(mask, x, absent)
                _store(builder, x, address)
            builder.store(greater(x, builder.load(best)), best)

        _over(builder, v_count, vector, find_highest)
        top = _fold(builder, builder.load(best), greater)
        is_present = builder.fcmp_unordered("!=", top, ir.Constant(element, -np.inf))
        top = builder.select(is_present, top, ir.Constant(element, 0.0))

        def exponentiate(place: Any, mask: Any) -> None:
            address = builder.gep(start, [place])
            x = _load(builder, address, vector)
            power = _weight(builder, builder.fsub(x, _splat(builder, vector, top)))
            _store(builder, power, address)
            builder.store(add(builder.load(total), power), total)

        _over(builder, v_count, vector, exponentiate)
        mass = _fold(builder, builder.load(total), add)
        is_empty = builder.fcmp_ordered("==", mass, ir.Constant(element, 0.0))
        share = builder.fdiv(ir.Constant(element, 1.0), mass)
        share = builder.select(is_empty, ir.Constant(element, 0.0), share)

        def divide(place: Any, mask: Any) -> None:
            address = builder.gep(start, [place])
            x = _load(builder, address, vector)
            _store(builder, builder.fmul(x, _splat(builder, vector, share)), address)

        _over(builder, v_count, vector, divide)
        return context.get_dummy_value()

    return types.void(scores, _INT, _INT), generate


def _make_elementwise(function: Any, text: str) -> Any:
    @intrinsic
    def elementwise(typing: Any, x: Any, row: Any, first: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v_x, v_row, v_first, v_count = args
            element = context.get_data_type(x.dtype)
            vector = ir.VectorType(element, _lanes(element))
            start = _address(context, builder, x, v_x, v_row, v_first)

            def body(place: Any, mask: Any) -> None:
                address = builder.gep(start, [place])
                value = function(builder, _load(builder, address, vector, mask))
                _store(builder, value, address, mask)

            _over(builder, v_count, vector, body)
            return context.get_dummy_value()

        return types.void(x, _INT, _INT, _INT), generate

    elementwise.__doc__ = text
    return elementwise


def _sigmoid(builder: Any, x: Any) -> Any:
    one = ir.Constant(x.type, [1.0] * x.type.count)
    power = _exp(builder, builder.fneg(x))
    return builder.fdiv(one, builder.fadd(one, power))


def _tanh(builder: Any, x: Any) -> Any:
    one, two = (ir.Constant(x.type, [value] * x.type.count) for value in (1.0, 2.0))
    power = _exp(builder, builder.fmul(x, two))
    return builder.fsub(one, builder.fdiv(two, builder.fadd(one, power)))


sigmoid = _make_elementwise(_sigmoid, "Sigmoid of ``x[row, first:first + count]``, in place.")
tanh = _make_elementwise(_tanh, "tanh of ``x[row, first:first + count]``, in place.")


@intrinsic
def softmax_columns(typing: Any, x: Any) -> Any:
    """Softmax down the rows of a matrix, in place: every lane is a column of its own."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (v_x,) = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, _lanes(element))
        view = context.make_array(x)(context, builder, v_x)
        num_rows, num_columns = cgutils.unpack_tuple(builder, view.shape, 2)
        zeros = ir.Constant(vector, None)
        highest, total = (cgutils.alloca_once_value(builder, zeros) for _ in range(2))

        def columns(first: Any, mask: Any) -> None:
            def at(row: Any) -> Any:
                return _address(context, builder, x, v_x, row, first)

            top = _load(builder, at(ir.Constant(num_rows.type, 0)), vector, mask)
            builder.store(top, highest)
            with cgutils.for_range(builder, num_rows) as loop:
                value, best = _load(builder, at(loop.index), vector, mask), builder.load(highest)
                is_more = builder.fcmp_ordered(">", value, best)
                builder.store(builder.select(is_more, value, best), highest)
            builder.store(zeros, total)
            with cgutils.for_range(builder, num_rows) as loop:
                value = _load(builder, at(loop.index), vector, mask)
                power = _weight(builder, builder.fsub(value, builder.load(highest)))
                _store(builder, power, at(loop.index), mask)
                builder.store(builder.fadd(builder.load(total), power, flags=_FAST), total)
            one = ir.Constant(vector, [1.0] * vector.count)
            share = builder.fdiv(one, builder.load(total))
            with cgutils.for_range(builder, num_rows) as loop:
                value = _load(builder, at(loop.index), vector, mask)
                _store(builder, builder.fmul(value, share), at(loop.index), mask)

        with builder.if_then(builder.icmp_signed(">", num_rows, ir.Constant(num_rows.type, 0))):
            _over(builder, num_columns, vector, columns)
        return context.get_dummy_value()

    return types.void(x), generate


@intrinsic
def softmax_columns_backward(typing: Any, grad: Any, weights: Any) -> Any:
    """``grad = weights * (grad - sum over rows of weights * grad)``, in place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_grad, v_weights = args
        element = context.get_data_type(grad.dtype)
        vector = ir.VectorType(element, _lanes(element))
        view = context.make_array(grad)(context, builder, v_grad)
        num_rows, num_columns = cgutils.unpack_tuple(builder, view.shape, 2)
        zeros = ir.Constant(vector, None)
        total = cgutils.alloca_once_value(builder, zeros)

        def columns(first: Any, mask: Any) -> None:
            def pair(row: Any) -> tuple[Any, Any, Any]:
                at = _address(context, builder, grad, v_grad, row, first)
                other = _address(context, builder, weights, v_weights, row, first)
                return at, _load(builder, at, vector, mask), _load(builder, other, vector, mask)

            builder.store(zeros, total)
            with cgutils.for_range(builder, num_rows) as loop:
                _, slope, weight = pair(loop.index)
                _multiply_add(builder, total, slope, weight)
            with cgutils.for_range(builder, num_rows) as loop:
                at, slope, weight = pair(loop.index)
                slope = builder.fsub(slope, builder.load(total))
                _store(builder, builder.fmul(weight, slope), at, mask)

        _over(builder, num_columns, vector, columns)
        return context.get_dummy_value()

    return types.void(grad, weights), generate


@intrinsic
def transpose(typing: Any, out: Any, x: Any) -> Any:
    """``out = x'``, by square blocks that are turned in registers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_out, v_x = args
        element = context.get_data_type(x.dtype)
        vector = ir.VectorType(element, _lanes(element))
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
                    own = builder.and_(_splat(builder, lanes, is_there), mask)
                places.append((_address(context, builder, kind, array, at, column), own))
            return places

        def turn(row: Any, column: Any, row_mask: Any, column_mask: Any) -> None:
            is_whole = row_mask is None
            rows = [
                _load(builder, address, vector, mask)
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
                                a, b, ir.Constant(ir.VectorType(_I32, size), lanes)
                            )
                            for lanes in (low, high)
                        )
                half //= 2
            targets = block(out, v_out, column, row, row_mask, None if is_whole else num_columns)
            for value, (address, mask) in zip(rows, targets, strict=True):
                _store(builder, value, address, mask)

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
                        row_mask = _mask(builder, vector, builder.sub(num_rows, row))
                        column_mask = _mask(builder, vector, builder.sub(num_columns, column))
                        turn(row, column, row_mask, column_mask)
        return context.get_dummy_value()

    return types.void(out, x), generate


def _round_up(builder: Any, count: Any, step: Any) -> Any:
    return builder.add(count, builder.sub(step, ir.Constant(count.type, 1)))
