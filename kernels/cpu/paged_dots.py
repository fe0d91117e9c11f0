"""The inner loops of attention of one query: keys and values are multiplied as they lie in pages.

Written in LLVM's language around AVX512-BF16's products of pairs, like `dots`. Sixteen scores are
summed across their lanes together, by a tree of shuffles: one by one, that would take longer than
the products. Values are interleaved key by key in registers, once for all rows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.cpu.dots import DOTS, broadcast, constant, pointer_to
from kernels.cpu.simd import LANES, LINE, QUARTERS, BFloat, emit_totals, f32x16, shuffle

MAX_ROWS = 4
"""Rows that `add_values` sums at once: 2 vectors of sums for each, beside the values."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(ir.FloatType(), LANES)
_PAIRS = ir.VectorType(BFloat(), 2 * LANES)
_HALVES = ir.VectorType(_I16, 2 * LANES)

_DOT = DOTS[types.uint16]


def _element(builder: Any, pointer: Any, index: Any, pointee: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), pointee.as_pointer())


def _place(builder: Any, places: Any, index: Any) -> Any:
    return builder.load(pointer_to(builder, places, builder.mul(index, constant(8)), _I64), align=8)


@intrinsic
def score_keys(
    typingctx: Any, kv: Any, places: Any, at: Any, queries: Any, query: Any, num_lines: Any
) -> Any:
    """Lane n = queries[query:] · kv[places[n] + at:] for 16 keys, of num_lines · 32 elements.

    kv, queries: pointers to bf16; places: address of int64 [16].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cache, table, offset, source, start, count = args
        keys = [builder.add(_place(builder, table, constant(n)), offset) for n in range(LANES)]
        before, loop = builder.block, builder.append_basic_block("lines")
        builder.branch(loop)
        builder.position_at_end(loop)
        line = builder.phi(_I64)
        line.add_incoming(constant(0), before)
        sums = [builder.phi(_SUMS) for _ in keys]
        skip = builder.mul(line, constant(LINE))
        x = builder.load(_element(builder, source, builder.add(start, skip), _PAIRS), align=2)
        results = []
        for key, total in zip(keys, sums, strict=True):
            pointer = _element(builder, cache, builder.add(key, skip), _PAIRS)
            results.append(_DOT.emit(builder, total, x, builder.load(pointer, align=2)))
        following = builder.add(line, constant(1))
        line.add_incoming(following, loop)
        for total, result in zip(sums, results, strict=True):
            total.add_incoming(ir.Constant(_SUMS, None), before)
            total.add_incoming(result, loop)
        after = builder.append_basic_block("totals")
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        return emit_totals(builder, results)

    integer = types.int64
    return f32x16(kv, integer, integer, queries, integer, integer), codegen


def _interleaved(builder: Any, a: Any, b: Any) -> list[Any]:
    """The pairs (a[n], b[n]) in two vectors: in each 8 elements the first 4, and the last 4."""
    vectors = []
    for half in (0, 4):
        order = [
            n + half + k + r * 2 * LANES
            for n in range(0, 2 * LANES, 8)
            for k in range(4)
            for r in (0, 1)
        ]
        vectors.append(builder.bitcast(shuffle(builder, a, b, order), _PAIRS))
    return vectors


def _emit_values(builder: Any, num_rows: int, args: Any, done: Any) -> None:
    """The loop over pairs of keys for a fixed number of rows."""
    sums_at, sums_stride, weights_at, weights_stride, kv, places, num_pairs, at, _ = args
    targets = [
        [
            pointer_to(
                builder,
                sums_at,
                builder.add(builder.mul(sums_stride, constant(n)), constant(4 * LANES * part)),
                _SUMS,
            )
            for part in (0, 1)
        ]
        for n in range(num_rows)
    ]
    begun = [[builder.load(target, align=4) for target in row] for row in targets]
    before, loop = builder.block, builder.append_basic_block(f"pairs_of_{num_rows}_rows")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_I64)
    pair.add_incoming(constant(0), before)
    sums = [[builder.phi(_SUMS) for _ in row] for row in targets]
    first = builder.mul(pair, constant(2))
    lines = [
        builder.load(
            _element(builder, kv, builder.add(_place(builder, places, index), at), _HALVES),
            align=2,
        )
        for index in (first, builder.add(first, constant(1)))
    ]
    values = _interleaved(builder, *lines)
    results = []
    for n, row in enumerate(sums):
        row_at, pair_at = builder.mul(weights_stride, constant(n)), builder.mul(pair, constant(4))
        place = builder.add(row_at, pair_at)
        weight = broadcast(builder, weights_at, place, _PAIRS)
        results.append([_DOT.emit(builder, s, v, weight) for s, v in zip(row, values, strict=True)])
    following = builder.add(pair, constant(1))
    pair.add_incoming(following, loop)
    for row, starts, ends in zip(sums, begun, results, strict=True):
        for phi, start, end in zip(row, starts, ends, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
    after = builder.append_basic_block(f"store_{num_rows}_rows")
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
    builder.position_at_end(after)
    for row, ends in zip(targets, results, strict=True):
        for target, end in zip(row, ends, strict=True):
            builder.store(end, target, align=4)
    builder.branch(done)


@intrinsic
def add_values(
    typingctx: Any,
    sums: Any,
    sums_stride: Any,
    weights: Any,
    weights_stride: Any,
    kv: Any,
    places: Any,
    num_pairs: Any,
    at: Any,
    num_rows: Any,
) -> Any:
    """sums[r] += the sum over j < 2 · num_pairs of weights[r, j] · kv[places[j] + at:], 32 columns.

    sums, weights, places: addresses of fp32 [num_rows, 32], whose columns are in the order that
    `in_order` undoes, bf16 [num_rows, ...] and int64; strides in bytes; kv: a pointer to bf16;
    num_rows: 1 .. MAX_ROWS.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done, entry = builder.append_basic_block("done"), builder.block
        cases = []
        for count in range(1, MAX_ROWS + 1):
            cases.append(builder.append_basic_block(f"rows_{count}"))
            builder.position_at_end(cases[-1])
            _emit_values(builder, count, args, done)
        builder.position_at_end(entry)
        switch = builder.switch(args[-1], done)
        for count, block in enumerate(cases, start=1):
            switch.add_case(constant(count), block)
        builder.position_at_end(done)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(*[integer] * 4, kv, *[integer] * 4), codegen


@intrinsic
def in_order(typingctx: Any, first: Any, second: Any) -> Any:
    """The 32 columns that `add_values` summed, in their order, as two vectors."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = (QUARTERS[:2], QUARTERS[2:])
        orders = [[lane + n for q in half for n in (0, LANES) for lane in q] for half in halves]
        parts = [shuffle(builder, args[0], args[1], order) for order in orders]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(f32x16, 2)(f32x16, f32x16), codegen
