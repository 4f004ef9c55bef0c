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
from numba.extending import intrinsic, overload

from nsm_graph.ops.cpu.compiled import OPTIONS

#: Rows that :func:`dots` multiplies at once: four sums are added up across their lanes together.
DOTS = 4

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


def _over_channels(builder: Any, num_channels: Any, vector: ir.VectorType, body: Any) -> None:
    """Calls ``body(first channel, mask)`` for whole vectors, then for a masked rest."""
    step = ir.Constant(num_channels.type, vector.count)
    num_whole = builder.udiv(num_channels, step)
    with cgutils.for_range(builder, num_whole) as loop:
        body(builder.mul(loop.index, step), None)
    done = builder.mul(num_whole, step)
    left = builder.sub(num_channels, done)
    with builder.if_then(builder.icmp_signed(">", left, ir.Constant(left.type, 0))):
        body(done, _mask(builder, vector, left))


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

        _over_channels(builder, _num_channels(context, builder, a, v_a), vector, body)
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

        _over_channels(builder, _num_channels(context, builder, x, v_x), vector, body)
        return context.get_dummy_value()

    signature = (out, _INT, _INT, x, index, weights, perm, _INT, _INT, out.dtype)
    return types.void(*signature), generate


@intrinsic
def _float_of_bits(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


def exponential(x: Any) -> Any:
    """exp(x) for x <= 0, at most two units in the last place off, in a form that vectorises."""
    return np.exp(x)


@overload(exponential, inline="always", jit_options=OPTIONS)
def _exponential(x):  # type: ignore[no-untyped-def]  # numba compares these names
    if x != types.float32:
        return lambda x: np.exp(x)

    def exp32(x):  # type: ignore[no-untyped-def]
        # 2^n exp(r) with |r| < log(2) / 2; log(2) in two parts, of which n times the first is
        # exact; coefficients as in Cephes. A comparison that NaN fails keeps NaN.
        x = np.float32(-87.0) if x < np.float32(-87.0) else x
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(0.5)
        power = _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
        return (p * r * r + r + np.float32(1.0)) * power

    return exp32
