"""Small matrix products for Numba kernels: one tile in registers, operands as they lie.

A tile of 8 rows and two vectors of columns takes two loads, eight broadcasts and 16 multiply-adds
a step, and nothing is packed or copied. At the sizes of a recurrent cell that is faster than a
BLAS, which packs its operands for products a thousand times larger.

Matrices are two-dimensional arrays. The left operand may have any strides (a transposed view
costs nothing); the others need columns side by side.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nsm_graph.ops.cpu import llvm
from nsm_graph.ops.cpu.compiled import INNER

_BYTE = ir.IntType(8)
#: Columns of the left operand that are worked through before the next tile.
DEPTH = 128


def _matrix(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, Any, Any]:
    """Where a matrix begins, and its strides in bytes."""
    view = context.make_array(kind)(context, builder, array)
    strides = cgutils.unpack_tuple(builder, view.strides, 2)
    return builder.bitcast(view.data, _BYTE.as_pointer()), strides[0], strides[1]


def _make_tile(rows: int, start: str) -> Any:
    @intrinsic
    def tile(typing: Any, out: Any, row: Any, column: Any, width: Any, a: Any, b: Any,
             initial: Any) -> Any:  # fmt: skip
        """``out[row:, column:column + width] = initial + a[row:] b[:, column:column + width]``."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v_out, v_row, v_column, v_width, v_a, v_b, v_initial = args
            element = context.get_data_type(out.dtype)
            vector = ir.VectorType(element, llvm.lanes(element))
            size = 4 if isinstance(element, ir.FloatType) else 8

            def constant(value: int) -> Any:
                return ir.Constant(v_row.type, value)

            def shift(pointer: Any, step: Any, stride: Any) -> Any:
                return builder.gep(pointer, [builder.mul(step, stride)], source_etype=_BYTE)

            def number(pointer: Any) -> Any:
                return builder.bitcast(pointer, element.as_pointer())

            at_out, out_row, _ = _matrix(context, builder, out, v_out)
            at_a, a_row, a_column = _matrix(context, builder, a, v_a)
            at_b, b_row, _ = _matrix(context, builder, b, v_b)
            depth = cgutils.unpack_tuple(
                builder, context.make_array(b)(context, builder, v_b).shape, 2
            )[0]
            offset = builder.mul(v_column, constant(size))
            at_b = builder.gep(at_b, [offset], source_etype=_BYTE)
            at_out = builder.gep(shift(at_out, v_row, out_row), [offset], source_etype=_BYTE)
            at_a = shift(at_a, v_row, a_row)
            outs = [shift(at_out, constant(i), out_row) for i in range(rows)]
            lefts = [shift(at_a, constant(i), a_row) for i in range(rows)]
            zeros = ir.Constant(vector, None)

            def product(num_vectors: int, mask: Any) -> None:
                def columns(pointer: Any) -> list:
                    return [
                        llvm.load(
                            builder, builder.gep(number(pointer), [constant(j)]), vector, mask
                        )
                        for j in range(0, num_vectors * vector.count, vector.count)
                    ]

                sums = [
                    [cgutils.alloca_once_value(builder, zeros) for _ in range(num_vectors)]
                    for _ in range(rows)
                ]
                first = [zeros] * num_vectors
                if start == "bias":
                    bias = context.make_array(initial)(context, builder, v_initial).data
                    first = columns(builder.gep(bias, [v_column]))
                for totals, place in zip(sums, outs, strict=True):
                    if start == "out":
                        first = columns(place)
                    for total, value in zip(totals, first, strict=True):
                        builder.store(value, total)
                with cgutils.for_range(builder, depth) as loop:
                    rights = columns(shift(at_b, loop.index, b_row))
                    along = builder.mul(loop.index, a_column)
                    for totals, left in zip(sums, lefts, strict=True):
                        x = number(builder.gep(left, [along], source_etype=_BYTE))
                        x = llvm.splat(builder, vector, builder.load(x, align=size))
                        for total, right in zip(totals, rights, strict=True):
                            llvm.multiply_add(builder, total, x, right)
                for totals, place in zip(sums, outs, strict=True):
                    for j, total in enumerate(totals):
                        target = builder.gep(number(place), [constant(j * vector.count)])
                        llvm.store(builder, builder.load(total), target, mask)

            def at_least(num_vectors: int) -> Any:
                return builder.icmp_signed(">=", v_width, constant(num_vectors * vector.count))

            with builder.if_else(at_least(2)) as (is_wide, is_narrow):
                with is_wide:
                    product(2, None)
                with is_narrow, builder.if_else(at_least(1)) as (is_whole, is_rest):
                    with is_whole:
                        product(1, None)
                    with is_rest:
                        product(1, llvm.mask(builder, vector, v_width))
            return context.get_dummy_value()

        return types.void(out, llvm.INT, llvm.INT, llvm.INT, a, b, initial), generate

    return tile


def _make_product(start: str) -> Any:
    tile8, tile4, tile1 = (_make_tile(rows, start) for rows in (8, 4, 1))

    @numba.njit(**INNER)
    def product(out, a, b, initial):  # type: ignore[no-untyped-def]
        num_rows, num_columns = out.shape
        lanes = 64 // out.itemsize
        column = 0
        while column < num_columns:
            width = num_columns - column
            row = 0
            while row + 8 <= num_rows:
                tile8(out, row, column, width, a, b, initial)
                row += 8
            if row + 4 <= num_rows:
                tile4(out, row, column, width, a, b, initial)
                row += 4
            while row < num_rows:
                tile1(out, row, column, width, a, b, initial)
                row += 1
            column += 2 * lanes if width >= 2 * lanes else lanes

    return product


_from_zero, _from_out, _from_bias = (_make_product(start) for start in ("zero", "out", "bias"))


@numba.njit(**INNER)
def multiply(out, a, b):  # type: ignore[no-untyped-def]
    """``out = a b``."""
    _from_zero(out[:, :], a[:, :], b[:, :], out[:, :])


@numba.njit(**INNER)
def add_product(out, a, b):  # type: ignore[no-untyped-def]
    """``out += a b``, piece by piece: both operands of a piece fit the first-level cache."""
    for first in range(0, b.shape[0], DEPTH):
        end = first + DEPTH
        _from_out(out[:, :], a[:, first:end], b[first:end, :], out[:, :])


@numba.njit(**INNER)
def affine(out, a, b, bias):  # type: ignore[no-untyped-def]
    """``out = a b + bias``, the same bias in every row."""
    _from_bias(out[:, :], a[:, :], b[:, :], bias)
