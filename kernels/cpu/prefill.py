"""Paged attention of prefill in bf16, as two products of `dots.tile_dots` about an online softmax.

A worker takes one KV head of one tile of queries, with all query heads of the group: rows
r = token · group + head. For a round of 64 keys it packs them into panels, once for all rows. The
weights of the values are rounded to bf16; sums are fp32.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.attention import KEYS, MASKED, find_places
from kernels.cpu.dots import PANEL, TILE_ROWS, store_interleaved, store_transposed, tile_dots
from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    LANES,
    add,
    elements,
    exp,
    f32,
    i32,
    i64,
    largest,
    load,
    maximum,
    mul,
    splat,
    store,
    sub,
    total,
    zero,
)

QUERIES = 64
"""Query tokens of one tile at most."""


def can_attend(head_dim: int) -> bool:
    """Whether heads of this size come in whole panels."""
    return head_dim % PANEL == 0


def scratch_bytes_for(group: int, dim: int) -> int:
    """Bytes of scratch that a worker needs, a multiple of a cache line."""
    rows = QUERIES * group
    queries, sums = 2 * rows * dim, 4 * rows * dim
    scores, weights = 4 * rows * KEYS, 2 * rows * KEYS
    return queries + sums + scores + weights + 2 * _panels_bytes(dim) + 128 * rows + _FIXED_BYTES


_FIXED_BYTES = 4 * TILE_ROWS * PANEL + 8 * KEYS


def _panels_bytes(dim: int) -> int:
    return 2 * KEYS * dim


@part
def _begin_rows(queries, sums, m, l, qkv, at, row_size, dim, num_rows, group, kind):
    """Copy the queries from qkv[at:] and begin the rows, which have seen no key."""
    for r in range(num_rows):
        place = at + r // group * row_size + r % group * dim
        f32(m)[r] = MASKED
        store(f32(l), 16 * r, zero())
        for i in range(0, dim, 16):
            store(elements(queries, kind), r * dim + i, load(qkv, place + i))
            store(f32(sums), r * dim + i, zero())


@part
def _pack_round(keys, values, kv, places, values_at, dim, kind):
    """Keys to panels [KEYS / 32, dim / 2, 32, 2], values to [dim / 32, KEYS / 2, 32, 2]."""
    flat = elements(kv, kind)
    for j in range(0, KEYS, LANES):
        for i in range(0, dim // 2, LANES):
            place = (j // PANEL * dim // 2 + i) * PANEL
            store_transposed(keys + 4 * place, j % PANEL, kv, places + 8 * j, i)
    for j in range(0, KEYS, 2):
        at, next_at = i64(places)[j] + values_at, i64(places)[j + 1] + values_at
        for i in range(0, dim, LANES):
            place = i // PANEL * KEYS // 2 * PANEL + j // 2 * PANEL + i % PANEL
            store_interleaved(values, place, flat, at + i, next_at + i)


@part
def _score(scores, tile, queries, keys, begin, num_rows, dim, scale, kind):
    """scores[r, KEYS] = scale · q[r] · keys for rows begin .. begin + num_rows ≤ TILE_ROWS."""
    factor = splat(np.float32(scale))
    for n in range(KEYS // PANEL):
        panel = keys + n * dim * PANEL * 2
        source = queries + 2 * begin * dim
        tile_dots(tile, num_rows, source, 2 * dim, panel, dim // 2, panel, kind)
        for r in range(num_rows):
            at = (begin + r) * KEYS + n * PANEL
            store(f32(scores), at, mul(load(f32(tile), r * PANEL), factor))
            store(f32(scores), at + 16, mul(load(f32(tile), r * PANEL + 16), factor))


@part
def _add_values(sums, tile, weights, values, begin, num_rows, dim, kind):
    """sums[r] += weights[r, KEYS] · values for rows begin .. begin + num_rows ≤ TILE_ROWS."""
    for n in range(dim // PANEL):
        panel = values + n * KEYS * PANEL * 2
        source = weights + 2 * begin * KEYS
        tile_dots(tile, num_rows, source, 2 * KEYS, panel, KEYS // 2, panel, kind)
        for r in range(num_rows):
            for i in range(0, PANEL, 16):
                at = (begin + r) * dim + n * PANEL + i
                store(f32(sums), at, add(load(f32(sums), at), load(f32(tile), r * PANEL + i)))


@part
def weigh(scores, weights, m, l, sums, row, low, high, dim, kind):
    """Turn a row's scores of keys low .. high into weights, rounded; rescale its l and sums."""
    own, place = f32(scores + 4 * row * KEYS), elements(weights + 2 * row * KEYS, kind)
    for j in range(low):
        own[j] = MASKED
    for j in range(max(low, high), KEYS):
        own[j] = MASKED
    s0, s1, s2, s3 = load(own, 0), load(own, 16), load(own, 32), load(own, 48)
    before = f32(m)[row]
    top = max(before, largest(maximum(maximum(s0, s1), maximum(s2, s3))))
    shift, totals = splat(top), load(f32(l), 16 * row)
    if top > before:
        f32(m)[row] = top
        rescale = exp(sub(splat(before), shift))
        totals = mul(totals, rescale)
        for i in range(row * dim, row * dim + dim, 16):
            store(f32(sums), i, mul(load(f32(sums), i), rescale))
    w0, w1, w2, w3 = (
        exp(sub(s0, shift)),
        exp(sub(s1, shift)),
        exp(sub(s2, shift)),
        exp(sub(s3, shift)),
    )
    store(f32(l), 16 * row, add(totals, add(add(w0, w1), add(w2, w3))))
    store(place, 0, w0)
    store(place, 16, w1)
    store(place, 32, w2)
    store(place, 48, w3)


@part
def _tile(
    out, out_at, out_size, qkv, q_at, row_size, kv, table, position, num_queries, shape, room
):
    """One KV head of `num_queries` queries, the first of which stands at `position`."""
    group, dim, window, scale, page_stride, block_size, width, head_at, kind = shape
    queries, sums, scores, weights, keys, values, m, l, tile, places = room
    num_rows = num_queries * group
    _begin_rows(queries, sums, m, l, qkv, q_at, row_size, dim, num_rows, group, kind)
    oldest = max(0, position - window + 1) if window > 0 else 0
    length = position + num_queries
    for first in range(oldest // KEYS * KEYS, length, KEYS):
        count = min(KEYS, length - first)
        # beyond `count` the last key again, with no weight
        find_places(places, table, first, KEYS, length, page_stride, block_size, width, head_at)
        _pack_round(keys, values, kv, places, block_size * width, dim, kind)
        # rows of queries that stand before the round's first key have nothing in it
        begin = max(0, first - position) * group
        for row in range(begin, num_rows, TILE_ROWS):
            rows = min(TILE_ROWS, num_rows - row)
            _score(scores, tile, queries, keys, row, rows, dim, scale, kind)
            for r in range(row, row + rows):
                newest = position + r // group
                low = newest - window + 1 if window > 0 else 0
                weigh(
                    scores, weights, m, l, sums, r, max(0, low - first),
                    min(count, newest + 1 - first), dim, kind,
                )  # fmt: skip
            _add_values(sums, tile, weights, values, row, rows, dim, kind)
    for r in range(num_rows):
        place = out_at + r // group * out_size + r % group * dim
        share = splat(np.float32(1.0) / total(load(f32(l), 16 * r)))
        for i in range(0, dim, 16):
            store(out, place + i, mul(load(f32(sums), r * dim + i), share))


@kernel
def prefill(
    kind, out, qkv, row_size, num_heads, num_kv_heads, dim, kv, page_stride, block_size,
    sequences, num_sequences, query_start, context_len, block_table, max_blocks, scale, window,
    scratch, scratch_bytes, queries_each, num_workers,
):  # fmt: skip
    """Addresses of the arguments of `kernels.reference.paged_attention`; tiles go round.

    scratch: address of bytes [num_workers, scratch_bytes], at a cache line, scratch_bytes as
    `scratch_bytes_for` says; queries_each ≤ QUERIES: tokens of a tile.
    """
    group = num_heads // num_kv_heads
    rows = QUERIES * group
    for worker in prange(num_workers):
        queries = scratch + worker * scratch_bytes
        sums = queries + 2 * rows * dim
        scores = sums + 4 * rows * dim
        weights = scores + 4 * rows * KEYS
        keys = weights + 2 * rows * KEYS
        values = keys + 2 * KEYS * dim
        tile = values + 2 * KEYS * dim
        places = tile + 4 * TILE_ROWS * PANEL
        m = places + 8 * KEYS
        room = (queries, sums, scores, weights, keys, values, m, m + 64 * rows, tile, places)
        width, item = num_kv_heads * dim, 0
        for index in range(num_sequences):
            sequence = np.int64(i32(sequences)[index])
            start = np.int64(i32(query_start)[sequence])
            stop = np.int64(i32(query_start)[sequence + 1])
            offset = np.int64(i32(context_len)[sequence]) - stop
            table = block_table + 4 * sequence * max_blocks
            for token in range(start, stop, queries_each):
                count = min(queries_each, stop - token)
                for head in range(num_kv_heads):
                    item += 1
                    if item % num_workers != worker:
                        continue
                    shape = (
                        group, dim, window, scale, page_stride, block_size, width, head * dim, kind,
                    )  # fmt: skip
                    _tile(
                        elements(out, kind), (token * num_heads + head * group) * dim,
                        num_heads * dim, elements(qkv, kind), token * row_size + head * group * dim,
                        row_size, kv, table, token + offset, count, shape, room,
                    )  # fmt: skip
