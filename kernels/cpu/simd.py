"""Vectors of 16 fp32 lanes for numba: loads that widen bf16, stores that round to it, FMA, exp.

numba has no vector type, and its loops are vectorised only where the compiler can prove what the
author knows. Here a value of type `f32x16` is an LLVM <16 x float>, which LLVM maps to whatever the
machine has (one AVX-512 register, two AVX, four NEON). Memory is a raw address and an index of
elements: `f32(address)` and `elements(address, kind)` make typed pointers, and the functions below
are compiled for fp32 and bf16. bf16 widens by a shift: its bits are the upper half of an fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
LINE = 32
"""Elements of bf16 in a cache line of 64 bytes: the distance between prefetches."""
FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Floating-point freedoms of the kernels: sums may be reordered; NaN and Inf keep their meaning."""

_HOST_MULTIPLIES_BF16 = bool(get_host_cpu_features().get("avx512bf16", False))

_FLOAT, _I16, _I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_BITS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(_I16, LANES)


class F32x16(types.Type):  # type: ignore[misc]
    """Numba's type of a vector of 16 fp32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@register_model(F32x16)
class _F32x16Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


def _pointer_maker(element: Any) -> Any:
    @intrinsic
    def make(typingctx: Any, address: Any) -> Any:
        result = types.CPointer(element)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), codegen

    return make


f32 = _pointer_maker(types.float32)
i32 = _pointer_maker(types.int32)
i64 = _pointer_maker(types.int64)


@intrinsic
def elements(typingctx: Any, address: Any, kind: Any) -> Any:
    """A pointer to elements of the type of `kind`: np.float32, or np.uint16 for bf16.

    The value of `kind` means nothing: its type selects the code that numba compiles.
    """
    result = types.CPointer(kind)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(types.int64, kind), codegen


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        single,
        ir.Constant(vector, ir.Undefined),
        ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES),
    )


def _call(builder: Any, name: str, result: Any, args: list[Any], fast: bool = False) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    flags = ("reassoc", "contract", "nsz") if fast else ()
    return builder.call(function, args, fastmath=flags)


def _lane_mask(builder: Any, count: Any) -> Any:
    lanes = ir.Constant(_BITS, list(range(LANES)))
    limit = _splat(builder, builder.trunc(count, _I32), _BITS)
    return builder.icmp_signed("<", lanes, limit)


def _widen(builder: Any, halves: Any) -> Any:
    shift = ir.Constant(_BITS, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(halves, _BITS), shift), _VECTOR)


def _rounded(builder: Any, vector: Any) -> Any:
    """The bits of fp32 rounded to bf16, to nearest, ties to even, in the upper halves of int32.

    NaN stays NaN. The lower halves are arbitrary.
    """
    bits = builder.bitcast(vector, _BITS)
    constant = lambda value: ir.Constant(_BITS, [value] * LANES)  # noqa: E731
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    return builder.select(is_nan, constant(0x7FC00000), rounded)


def _round(builder: Any, vector: Any) -> Any:
    """fp32 to bf16 bits."""
    upper = builder.lshr(_rounded(builder, vector), ir.Constant(_BITS, [16] * LANES))
    return builder.trunc(upper, _HALVES)


def _element_pointer(builder: Any, pointer: Any, index: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())


def _is_bf16(pointer: Any) -> bool:
    return bool(pointer.dtype == types.uint16)


@intrinsic
def load(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Lanes pointer[index .. index + 16], widened."""
    half = _is_bf16(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _HALVES if half else _VECTOR
        value = builder.load(
            _element_pointer(builder, args[0], args[1], kind), align=2 + 2 * (not half)
        )
        return _widen(builder, value) if half else value

    return f32x16(pointer, types.int64), codegen


@intrinsic
def load_part(typingctx: Any, pointer: Any, index: Any, count: Any) -> Any:
    """Lanes pointer[index .. index + count], widened; the lanes from `count` on are zero."""
    half = _is_bf16(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, suffix = (_HALVES, "i16") if half else (_VECTOR, "f32")
        source = _element_pointer(builder, args[0], args[1], kind)
        mask = _lane_mask(builder, args[2])
        align = ir.Constant(_I32, 2 if half else 4)
        value = _call(
            builder,
            f"llvm.masked.load.v16{suffix}.p0",
            kind,
            [source, align, mask, ir.Constant(kind, None)],
        )
        return _widen(builder, value) if half else value

    return f32x16(pointer, types.int64, types.int64), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, index: Any, vector: Any) -> Any:
    """pointer[index .. index + 16] = vector, rounded."""
    half = _is_bf16(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _HALVES if half else _VECTOR
        value = _round(builder, args[2]) if half else args[2]
        target = _element_pointer(builder, args[0], args[1], kind)
        builder.store(value, target, align=2 + 2 * (not half))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, f32x16), codegen


@intrinsic
def store_part(typingctx: Any, pointer: Any, index: Any, vector: Any, count: Any) -> Any:
    """pointer[index .. index + count] = the first lanes of vector, rounded."""
    half = _is_bf16(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, suffix = (_HALVES, "i16") if half else (_VECTOR, "f32")
        value = _round(builder, args[2]) if half else args[2]
        target = _element_pointer(builder, args[0], args[1], kind)
        mask = _lane_mask(builder, args[3])
        align = ir.Constant(_I32, 2 if half else 4)
        _call(
            builder,
            f"llvm.masked.store.v16{suffix}.p0",
            ir.VoidType(),
            [value, target, align, mask],
        )
        return context.get_dummy_value()

    return types.void(pointer, types.int64, f32x16, types.int64), codegen


@intrinsic
def load_pair(typingctx: Any, pointer: Any, index: Any) -> Any:
    """The 32 lanes from `index` on as two vectors: for bf16 the even ones and the odd ones.

    Two operations widen all of them so. For fp32 the vectors are the first and the second half;
    `store_pair` is the inverse of either.
    """
    half = _is_bf16(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if half:
            source = _element_pointer(builder, args[0], args[1], _BITS)
            bits = builder.load(source, align=2)
            low = builder.shl(bits, ir.Constant(_BITS, [16] * LANES))
            high = builder.and_(bits, ir.Constant(_BITS, [0xFFFF0000] * LANES))
            parts = [builder.bitcast(part, _VECTOR) for part in (low, high)]
        else:
            second = builder.add(args[1], ir.Constant(ir.IntType(64), LANES))
            parts = [
                builder.load(_element_pointer(builder, args[0], at, _VECTOR), align=4)
                for at in (args[1], second)
            ]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(f32x16, 2)(pointer, types.int64), codegen


@intrinsic
def store_pair(typingctx: Any, pointer: Any, index: Any, first: Any, second: Any) -> Any:
    """Put back what `load_pair` gave, rounded."""
    half = _is_bf16(pointer)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if half:
            sixteen = ir.Constant(_BITS, [16] * LANES)
            low = builder.lshr(_rounded(builder, args[2]), sixteen)
            high = builder.and_(
                _rounded(builder, args[3]), ir.Constant(_BITS, [0xFFFF0000] * LANES)
            )
            target = _element_pointer(builder, args[0], args[1], _BITS)
            builder.store(builder.or_(low, high), target, align=2)
        else:
            other = builder.add(args[1], ir.Constant(ir.IntType(64), LANES))
            for at, value in ((args[1], args[2]), (other, args[3])):
                builder.store(value, _element_pointer(builder, args[0], at, _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, f32x16, f32x16), codegen


@intrinsic
def prefetch(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Ask for the cache line of pointer[index]; a hint, harmless at any address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.gep(args[0], [args[1]])
        # for reading, to be kept in all caches, data
        hints = [ir.Constant(_I32, value) for value in (0, 2, 1)]
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, *hints])
        return context.get_dummy_value()

    return types.void(pointer, types.int64), codegen


@intrinsic
def splat(typingctx: Any, scalar: Any) -> Any:
    """A vector whose lanes are all `scalar`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], _VECTOR)

    return f32x16(types.float32), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """A·b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", _VECTOR, list(args))

    return f32x16(f32x16, f32x16, f32x16), codegen


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_PAIRS = ir.VectorType(BFloat(), 2 * LANES)


@intrinsic
def fma_pairs(typingctx: Any, a: Any, i: Any, b: Any, j: Any, sums: Any) -> Any:
    """Sums plus the 32 products a[i .. i + 32] · b[j .. j + 32], two in each lane; a and b alike.

    bf16 by one instruction where the processor has it; which lane takes which product differs
    without it.
    """
    native = _is_bf16(a) and _HOST_MULTIPLIES_BF16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a_at, first, b_at, second, total_ = args
        if native:
            x, y = (
                builder.load(_element_pointer(builder, at, index, _PAIRS), align=2)
                for at, index in ((a_at, first), (b_at, second))
            )
            return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _VECTOR, [total_, x, y])
        half = _is_bf16(a)
        kind = _HALVES if half else _VECTOR
        for lanes in (0, LANES):
            skip = ir.Constant(ir.IntType(64), lanes)
            x, y = (
                builder.load(_element_pointer(builder, at, builder.add(index, skip), kind), align=2)
                for at, index in ((a_at, first), (b_at, second))
            )
            if half:
                x, y = _widen(builder, x), _widen(builder, y)
            total_ = _call(builder, "llvm.fma.v16f32", _VECTOR, [x, y, total_])
        return total_

    return f32x16(a, types.int64, b, types.int64, f32x16), codegen


def _binary(name: str) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return f32x16(f32x16, f32x16), codegen

    return operation


add, sub, mul, div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of each lane pair."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.maxnum.v16f32", _VECTOR, list(args))

    return f32x16(f32x16, f32x16), codegen


QUARTERS = [range(n, n + 4) for n in range(0, LANES, 4)]
"""The lanes of each part of 128 bits, within which shuffles are cheap."""

_SUM_TREE = [
    # in each quarter 0 1 of a and of b in turn, plus 2 3; then the pairs of two such
    [[lane for q in QUARTERS for i in pair for lane in (q[i], LANES + q[i])]
     for pair in ((0, 1), (2, 3))],
    [[lane for q in QUARTERS for lane in (q[i], q[i + 1], LANES + q[i], LANES + q[i + 1])]
     for i in (0, 2)],
    # quarters 0 1 of a and of b, plus 2 3; then 0 2, plus 1 3
    [[n + lane for n in (0, LANES) for lane in range(first, first + 8)] for first in (0, 8)],
    [[n + lane for n in (0, LANES) for q in (i, i + 2) for lane in QUARTERS[q]] for i in (0, 1)],
]  # fmt: skip
"""Lanes to take of two vectors, twice, and to add: four times, and 16 vectors are one of totals."""


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Emit the lanes of a, then of b, that are named."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def emit_totals(builder: Any, vectors: list[Any]) -> Any:
    """Emit a vector whose lane n is the sum of the lanes of vectors[n], n < 16.

    One by one the sums would take four times the operations; every sum is taken in one order.
    """
    for first, second in _SUM_TREE:
        vectors = [
            builder.fadd(shuffle(builder, a, b, first), shuffle(builder, a, b, second))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """The sum of the lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(_FLOAT, 0.0)
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", _FLOAT, [zero, args[0]], fast=True)

    return types.float32(f32x16), codegen


@intrinsic
def total_each(typingctx: Any, vectors: Any) -> Any:
    """A tuple of 4 vectors to one: lane n = the sum of the lanes of vectors[n mod 4]; of 16: n."""
    count = len(vectors)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = [builder.extract_value(args[0], n) for n in range(count)]
        return emit_totals(builder, parts * (LANES // count))

    return f32x16(vectors), codegen


@intrinsic
def load_four(typingctx: Any, pointer: Any, index: Any, count: Any) -> Any:
    """fp32 pointer[index .. index + count], count up to 4, four times over; zero from it on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        four = ir.VectorType(_FLOAT, 4)
        lanes = ir.Constant(ir.VectorType(_I32, 4), [0, 1, 2, 3])
        limit = shuffle(builder, _splat(builder, builder.trunc(args[2], _I32), _BITS),
                        ir.Constant(_BITS, ir.Undefined), [0, 1, 2, 3])  # fmt: skip
        mask = builder.icmp_signed("<", lanes, limit)
        source = _element_pointer(builder, args[0], args[1], four)
        align = ir.Constant(_I32, 4)
        value = _call(builder, "llvm.masked.load.v4f32.p0", four,
                      [source, align, mask, ir.Constant(four, None)])  # fmt: skip
        return shuffle(builder, value, value, [0, 1, 2, 3] * 4)

    return f32x16(types.CPointer(types.float32), types.int64, types.int64), codegen


@intrinsic
def largest(typingctx: Any, a: Any) -> Any:
    """The largest lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", _FLOAT, [args[0]])

    return types.float32(f32x16), codegen


@intrinsic
def round_to_int(typingctx: Any, a: Any) -> Any:
    """The nearest whole numbers, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.rint.v16f32", _VECTOR, [args[0]])

    return f32x16(f32x16), codegen


@intrinsic
def _power_of_two(typingctx: Any, a: Any) -> Any:
    """2^a for lanes that hold whole numbers in -127 .. 127."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = builder.fptosi(args[0], _BITS)
        biased = builder.add(whole, ir.Constant(_BITS, [127] * LANES))
        return builder.bitcast(builder.shl(biased, ir.Constant(_BITS, [23] * LANES)), _VECTOR)

    return f32x16(f32x16), codegen


@njit(inline="always")
def zero() -> Any:
    """A vector of zeros."""
    return splat(np.float32(0.0))


@njit(inline="always")
def exp(x: Any) -> Any:
    """e^x, within 2 ulp for x in -87 .. 88; arguments outside are clamped to that range.

    Cephes' expf: x = n·ln 2 + r, |r| ≤ ln 2 / 2, a polynomial in r, scaled by 2^n.
    """
    x = maximum(x, splat(np.float32(-87.0)))
    x = sub(zero(), maximum(sub(zero(), x), splat(np.float32(-88.0))))
    n = round_to_int(mul(x, splat(np.float32(1.44269504088896341))))
    r = fma(n, splat(np.float32(-0.693359375)), x)
    r = fma(n, splat(np.float32(2.12194440e-4)), r)
    p = splat(np.float32(1.9875691500e-4))
    p = fma(p, r, splat(np.float32(1.3981999507e-3)))
    p = fma(p, r, splat(np.float32(8.3334519073e-3)))
    p = fma(p, r, splat(np.float32(4.1665795894e-2)))
    p = fma(p, r, splat(np.float32(1.6666665459e-1)))
    p = fma(p, r, splat(np.float32(5.0000001201e-1)))
    p = fma(p, mul(r, r), add(r, splat(np.float32(1.0))))
    return mul(p, _power_of_two(n))
