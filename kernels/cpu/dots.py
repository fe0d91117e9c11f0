"""The inner loop of a matrix product: up to 12 rows by 32 columns, summed in registers.

numba has no instruction for products of bf16 pairs (AVX512-BF16: VDPBF16PS) or of int8 fours
(AVX512-VNNI: VPDPBUSD); here the loop over the inputs is written in LLVM's language around them. A
row's sums are taken in one order whatever the number of rows, so that a token's result is the same
to the bit in every batch.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.simd import LANES, BFloat, f32x16, shuffle

TILE_ROWS = 12
"""Rows that are summed at once: with 2 vectors of columns, 24 of the 32 registers hold sums."""
PANEL = 32
"""Columns that are summed at once, and that lie together in a packed weight."""
STEP_BYTES = 4
"""Bytes of x that one instruction takes in: two of bf16, four of int8."""

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VECTORS = PANEL // LANES
_BYTES = 64


class _Dot:
    """The instruction of one kind of weight: the types of its operands, and its call."""

    def __init__(self, name: str, sums: Any, operand: Any) -> None:
        self.name, self.sums, self.operand = name, sums, operand

    def emit(self, builder: Any, sums: Any, weights: Any, inputs: Any) -> Any:
        """Sums + weights · inputs."""
        kind = ir.FunctionType(self.sums, [self.sums, self.operand, self.operand])
        function = cgutils.get_or_insert_function(builder.module, kind, self.name)
        return builder.call(function, [sums, weights, inputs])


DOTS = {
    types.uint16: _Dot(
        "llvm.x86.avx512bf16.dpbf16ps.512",
        ir.VectorType(ir.FloatType(), LANES),
        ir.VectorType(BFloat(), 2 * LANES),
    ),
    types.uint8: _Dot(
        "llvm.x86.avx512.vpdpbusd.512",
        ir.VectorType(_I32, LANES),
        ir.VectorType(_I8, 4 * LANES),
    ),
}
"""By the element of the weights: bf16 (as its bits), or uint8 beside inputs of int8."""


def constant(value: int) -> Any:
    """An int64."""
    return ir.Constant(_I64, value)


def pointer_to(builder: Any, address: Any, offset: Any, pointee: Any) -> Any:
    """The address plus an offset in bytes, as a pointer."""
    return builder.inttoptr(builder.add(address, offset), pointee.as_pointer())


def _prefetch(builder: Any, address: Any, offset: Any) -> None:
    """Ask for a cache line, to be kept in the second cache."""
    pointer = pointer_to(builder, address, offset, _I8)
    hints = [ir.Constant(_I32, value) for value in (0, 2, 1)]
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, *hints])


def broadcast(builder: Any, address: Any, offset: Any, operand: Any) -> Any:
    """The STEP_BYTES at address + offset in every lane."""
    lanes = ir.VectorType(_I32, LANES)
    undefined = ir.Constant(lanes, ir.Undefined)
    value = builder.load(pointer_to(builder, address, offset, _I32), align=1)
    single = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    everywhere = ir.Constant(lanes, [0] * LANES)
    return builder.bitcast(builder.shuffle_vector(single, undefined, everywhere), operand)


def _emit_tile(builder: Any, dot: _Dot, num_rows: int, args: Any, done: Any) -> None:
    """One loop over the inputs for a fixed number of rows, then its sums to the tile."""
    tile, _, x, x_stride, panel, num_steps, ahead, _ = args
    before, loop = builder.block, builder.append_basic_block(f"steps_of_{num_rows}_rows")
    rows = [builder.add(x, builder.mul(x_stride, constant(n))) for n in range(num_rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(constant(0), before)
    sums = [[builder.phi(dot.sums) for _ in range(_VECTORS)] for _ in rows]
    offset = builder.mul(step, constant(_BYTES * _VECTORS))
    weights = []
    for n in range(_VECTORS):
        at = builder.add(offset, constant(_BYTES * n))
        weights.append(builder.load(pointer_to(builder, panel, at, dot.operand), align=_BYTES))
        _prefetch(builder, ahead, at)
    x_offset = builder.mul(step, constant(STEP_BYTES))
    results = []
    for row, row_sums in zip(rows, sums, strict=True):
        inputs = broadcast(builder, row, x_offset, dot.operand)
        results.append(
            [dot.emit(builder, s, w, inputs) for s, w in zip(row_sums, weights, strict=True)]
        )
    next_step = builder.add(step, constant(1))
    step.add_incoming(next_step, loop)
    for row_sums, row_results in zip(sums, results, strict=True):
        for phi, result in zip(row_sums, row_results, strict=True):
            phi.add_incoming(ir.Constant(dot.sums, None), before)
            phi.add_incoming(result, loop)
    after = builder.append_basic_block(f"store_{num_rows}_rows")
    builder.cbranch(builder.icmp_signed("<", next_step, num_steps), loop, after)
    builder.position_at_end(after)
    for n, row_results in enumerate(results):
        for m, result in enumerate(row_results):
            at = constant(_BYTES * (_VECTORS * n + m))
            builder.store(result, pointer_to(builder, tile, at, dot.sums), align=4)
    builder.branch(done)


@intrinsic
def tile_dots(
    typingctx: Any,
    tile: Any,
    num_rows: Any,
    x: Any,
    x_stride: Any,
    panel: Any,
    num_steps: Any,
    ahead: Any,
    kind: Any,
) -> Any:
    """tile[n] = x[n] · panel for n < num_rows, 1 .. TILE_ROWS; tile [TILE_ROWS, PANEL].

    tile, x, panel, ahead: addresses; x_stride: bytes between rows of x; panel [num_steps, PANEL,
    STEP_BYTES], aligned to 64 bytes; as much is prefetched from `ahead`. The type of `kind` is that
    of the weights: uint16 for bf16, whose sums are fp32, or uint8 beside int8 inputs: int32.
    """
    dot = DOTS[kind]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done = builder.append_basic_block("done")
        entry = builder.block
        cases = []
        for count in range(1, TILE_ROWS + 1):
            cases.append(builder.append_basic_block(f"rows_{count}"))
            builder.position_at_end(cases[-1])
            _emit_tile(builder, dot, count, args, done)
        builder.position_at_end(entry)
        switch = builder.switch(args[1], done)
        for count, block in enumerate(cases, start=1):
            switch.add_case(constant(count), block)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, kind), codegen


@intrinsic
def load_counts(typingctx: Any, address: Any, index: Any, minus: Any) -> Any:
    """int32 address[index .. index + 16] - minus, in exact integers, as fp32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.VectorType(_I32, LANES)
        undefined = ir.Constant(lanes, ir.Undefined)
        offset = builder.mul(args[1], constant(4))
        counts = builder.load(pointer_to(builder, args[0], offset, lanes), align=4)
        single = builder.insert_element(
            undefined, builder.trunc(args[2], _I32), ir.Constant(_I32, 0)
        )
        every = builder.shuffle_vector(single, undefined, ir.Constant(lanes, [0] * LANES))
        return builder.sitofp(builder.sub(counts, every), ir.VectorType(ir.FloatType(), LANES))

    return f32x16(types.int64, types.int64, types.int64), codegen


@intrinsic
def store_int8(typingctx: Any, address: Any, index: Any, vector: Any) -> Any:
    """int8 address[index .. index + 16] = vector, whose lanes hold whole numbers in -128 .. 127."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_ = ir.VectorType(_I8, LANES)
        builder.store(
            builder.fptosi(args[2], bytes_),
            pointer_to(builder, args[0], args[1], bytes_),
            align=1,
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, f32x16), codegen


@intrinsic
def store_interleaved(
    typingctx: Any, address: Any, index: Any, pointer: Any, first: Any, second: Any
) -> Any:
    """bf16 pairs (pointer[first + n], pointer[second + n]), n < 16, to int32 address[index + n]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, place, source, low_at, high_at = args
        halves, lanes = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(_I32, LANES)
        low, high = (
            builder.zext(
                builder.load(
                    builder.bitcast(builder.gep(source, [at]), halves.as_pointer()), align=2
                ),
                lanes,
            )
            for at in (low_at, high_at)
        )
        pairs = builder.or_(low, builder.shl(high, ir.Constant(lanes, [16] * LANES)))
        offset = builder.mul(place, constant(4))
        builder.store(pairs, pointer_to(builder, target, offset, lanes), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, pointer, types.int64, types.int64), codegen


@intrinsic
def store_transposed(
    typingctx: Any, panel: Any, column: Any, source: Any, places: Any, first: Any
) -> Any:
    """panel[i, column + n] = pair first + i of bf16 at source[places[n]:], i and n < 16.

    panel: address of int32 [16, PANEL], one for each pair; source: address of bf16; places: address
    of int64 [16]. In registers, by swaps of ever smaller blocks.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, at, base, table, skip = args
        lanes = ir.VectorType(_I32, LANES)
        vectors = []
        for n in range(LANES):
            place = builder.load(pointer_to(builder, table, constant(8 * n), _I64), align=8)
            pairs = builder.add(builder.mul(place, constant(2)), builder.mul(skip, constant(4)))
            vectors.append(builder.load(pointer_to(builder, base, pairs, lanes), align=2))
        for size in (8, 4, 2, 1):
            upper = [n if n & size == 0 else LANES + n - size for n in range(LANES)]
            lower = [n + size if n & size == 0 else LANES + n for n in range(LANES)]
            for n in (n for n in range(LANES) if n & size == 0):
                a, b = vectors[n], vectors[n + size]
                vectors[n], vectors[n + size] = (
                    shuffle(builder, a, b, order) for order in (upper, lower)
                )
        for i, vector in enumerate(vectors):
            offset = builder.mul(builder.add(at, constant(PANEL * i)), constant(4))
            builder.store(vector, pointer_to(builder, target, offset, lanes), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
