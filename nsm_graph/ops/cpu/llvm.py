"""Pieces of LLVM that vector code for Numba kernels is put together from.

Every function adds instructions where the builder stands. Vectors have 64 bytes: 16 numbers in
float32, 8 in float64.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

INT = types.intp
I32 = ir.IntType(32)
#: Sums may be reordered; NaN and infinity keep their meaning.
FAST = ("reassoc", "contract", "arcp", "nsz")


def lanes(element: ir.Type) -> int:
    return 16 if isinstance(element, ir.FloatType) else 8


def address(context: Any, builder: Any, kind: Any, array: Any, *index: Any) -> Any:
    view = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, view, list(index))


def num_channels(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return builder.extract_value(context.make_array(kind)(context, builder, array).shape, 2)


def word(builder: Any, value: Any, like: Any) -> Any:
    """An index of any width as a machine word."""
    return value if value.type == like.type else builder.sext(value, like.type)


def suffix(vector: ir.VectorType) -> str:
    return f"v{vector.count}{'f32' if isinstance(vector.element, ir.FloatType) else 'f64'}"


def mask(builder: Any, vector: ir.VectorType, left: Any) -> Any:
    """Lanes below ``left``."""
    lanes = ir.VectorType(I32, vector.count)
    left = builder.trunc(left, I32)
    steps = ir.Constant(lanes, list(range(vector.count)))
    return builder.icmp_signed("<", steps, splat(builder, lanes, left))


def splat(builder: Any, vector: ir.VectorType, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    order = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), order)


def load(builder: Any, address: Any, vector: ir.VectorType, mask: Any = None) -> Any:
    size = 4 if isinstance(vector.element, ir.FloatType) else 8
    address = builder.bitcast(address, vector.as_pointer())
    if mask is None:
        return builder.load(address, align=size)
    kind = ir.FunctionType(vector, [address.type, I32, mask.type, vector])
    name = f"llvm.masked.load.{suffix(vector)}.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    zeros = ir.Constant(vector, None)
    return builder.call(function, [address, ir.Constant(I32, size), mask, zeros])


def store(builder: Any, value: Any, address: Any, mask: Any = None) -> None:
    vector = value.type
    size = 4 if isinstance(vector.element, ir.FloatType) else 8
    address = builder.bitcast(address, vector.as_pointer())
    if mask is None:
        builder.store(value, address, align=size)
        return
    kind = ir.FunctionType(ir.VoidType(), [vector, address.type, I32, mask.type])
    name = f"llvm.masked.store.{suffix(vector)}.p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(function, [value, address, ir.Constant(I32, size), mask])


def store_past(builder: Any, value: Any, address: Any) -> None:
    """Stores a vector at a multiple of its size, past the cache."""
    address = builder.bitcast(address, value.type.as_pointer())
    stored = builder.store(value, address, align=64)
    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> None:
    """``total += a * b``, where ``total`` is a place on the stack."""
    product = builder.fmul(a, b, flags=FAST)
    builder.store(builder.fadd(builder.load(total), product, flags=FAST), total)


def over(builder: Any, count: Any, vector: ir.VectorType, body: Any) -> None:
    """Calls ``body(first, mask)`` for each whole vector of ``count`` numbers, then for the rest."""
    step = ir.Constant(count.type, vector.count)
    num_whole = builder.udiv(count, step)
    with cgutils.for_range(builder, num_whole) as loop:
        body(builder.mul(loop.index, step), None)
    done = builder.mul(num_whole, step)
    left = builder.sub(count, done)
    with builder.if_then(builder.icmp_signed(">", left, ir.Constant(left.type, 0))):
        body(done, mask(builder, vector, left))


def fold(builder: Any, vector: Any, combine: Any) -> Any:
    """All lanes combined into one number."""
    return builder.extract_element(halve(builder, vector, combine, 1), ir.Constant(I32, 0))


def fold_groups(builder: Any, vector: Any, combine: Any, width: int) -> Any:
    """Combines the lanes of each group of ``width``; every lane gets its group's result."""
    distance = width // 2
    while distance > 0:
        others = [lane ^ distance for lane in range(vector.type.count)]
        order = ir.Constant(ir.VectorType(I32, len(others)), others)
        undefined = ir.Constant(vector.type, ir.Undefined)
        vector = combine(vector, builder.shuffle_vector(vector, undefined, order))
        distance //= 2
    return vector


def halve(builder: Any, vector: Any, combine: Any, width: int) -> Any:
    """The upper half combined with the lower one, until ``width`` lanes are left."""
    left = vector.type.count
    while left > width:
        left //= 2
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, left), lanes))
            for lanes in (list(range(left)), list(range(left, 2 * left)))
        )
        vector = combine(low, high)
    return vector


def exp(builder: Any, x: Any) -> Any:
    """exp(x) lane by lane; in float32 within two units in the last place, cut off at -87 and 88."""
    vector = x.type
    if not isinstance(vector.element, ir.FloatType):
        return each_lane(builder, "exp", x)

    def constant(value: float) -> Any:
        return ir.Constant(vector, [value] * vector.count)

    def add(a: Any, b: Any) -> Any:
        return builder.fadd(a, b, flags=FAST)

    def multiply(a: Any, b: Any) -> Any:
        return builder.fmul(a, b, flags=FAST)

    # 2^n exp(r) with |r| <= log(2) / 2. log(2) comes in two parts, of which n times the first is
    # exact; coefficients as in Cephes. A comparison that NaN fails keeps NaN.
    least, most = constant(-87.0), constant(88.0)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
    n = each_lane(builder, "floor", add(multiply(x, constant(1.44269504)), constant(0.5)))
    r = add(x, multiply(n, constant(-0.693359375)))
    r = add(r, multiply(n, constant(2.12194440e-4)))
    p = constant(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = add(multiply(p, r), constant(term))
    p = add(add(multiply(multiply(p, r), r), r), constant(1.0))
    whole = ir.VectorType(I32, vector.count)

    def integer(value: int) -> Any:
        return ir.Constant(whole, [value] * vector.count)

    # NaN has no integer; the product is NaN all the same.
    n = builder.select(builder.fcmp_ordered("ord", n, n), n, constant(0.0))
    exponent = builder.add(builder.fptosi(n, whole), integer(127))
    return builder.fmul(p, builder.bitcast(builder.shl(exponent, integer(23)), vector))


def weight(builder: Any, x: Any) -> Any:
    """exp(x) of a score below the highest; exactly 0 where it is next to the smallest number.

    Numbers smaller than that cost a hundred times as much to compute with.
    """
    vector = x.type
    least = -87.0 if isinstance(vector.element, ir.FloatType) else -708.0
    is_nothing = builder.fcmp_ordered("<", x, ir.Constant(vector, [least] * vector.count))
    return builder.select(is_nothing, ir.Constant(vector, None), exp(builder, x))


def each_lane(builder: Any, operation: str, x: Any) -> Any:
    kind = ir.FunctionType(x.type, [x.type])
    name = f"llvm.{operation}.{suffix(x.type)}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [x])


def across(builder: Any, sums: list, vector: ir.VectorType) -> Any:
    """Four vectors -> one of four lanes, which hold their totals."""

    def pick(x: Any, y: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def join(x: Any, y: Any, one: tuple, other: tuple) -> Any:
        # Within every four lanes, which is cheap; 0 to 3 are of x, 4 to 7 of y.
        def spread(four: tuple) -> list[int]:
            return [
                4 * block + lane % 4 + (vector.count if lane >= 4 else 0)
                for block in range(vector.count // 4)
                for lane in four
            ]

        return builder.fadd(pick(x, y, spread(one)), pick(x, y, spread(other)), flags=FAST)

    a, b, c, d = sums
    ends = (0, 1, 4, 5), (2, 3, 6, 7)
    total = join(join(a, b, *ends), join(c, d, *ends), (0, 2, 4, 6), (1, 3, 5, 7))
    return halve(builder, total, lambda x, y: builder.fadd(x, y, flags=FAST), 4)
