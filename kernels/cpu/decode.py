"""Paged attention of decode in bf16: an online softmax over rounds of 64 keys, all heads together.

A worker takes all KV heads of one sequence, or one where sequences are few, and reads its part of
the cache once, in the order in which it lies. Rows are query heads. The weights of the values are
rounded to bf16, as in `prefill`; sums are fp32.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.attention import KEYS, MASKED, find_places
from kernels.cpu.paged_dots import MAX_ROWS, add_values, in_order, score_keys
from kernels.cpu.prefill import weigh
from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    LANES,
    LINE,
    elements,
    f32,
    i32,
    i64,
    load,
    mul,
    prefetch,
    splat,
    store,
    total,
    zero,
)


def scratch_bytes_for(num_heads: int, dim: int) -> int:
    """Bytes of scratch that a worker needs, a multiple of a cache line."""
    row = 4 * dim + 4 * KEYS + 2 * KEYS + 4 * LANES + 4
    return -(-(num_heads * row + 2 * 8 * KEYS) // 64) * 64


@part
def _ask(kv, places, begin, end, at, width):
    """Prefetch `width` elements of the tokens begin .. end."""
    for j in range(begin, end):
        place = i64(places)[j] + at
        for i in range(0, width, LINE):
            prefetch(kv, place + i)


@part
def _score_round(scores, qkv, query, kv, places, begin, count, rows, shape, width):
    """scores[r, j] = scale · q[r] · k[j] of a round; asks for the values of its tokens."""
    group, dim, _, values_at, _, scale, _ = shape
    factor, each = splat(np.float32(scale)), -(-LANES // rows)
    for j in range(begin // LANES * LANES, count, LANES):
        for r in range(rows):
            _ask(kv, places, j + r * each, j + min(LANES, (r + 1) * each), values_at, width)
            dots = score_keys(
                kv, places + 8 * j, r // group * dim, qkv, query + r * dim, dim // LINE
            )
            store(f32(scores), r * KEYS + j, mul(dots, factor))


@part
def _weigh_values(sums, weights, kv, places, count, num_heads, shape, ahead, width):
    """Add the values of a round to all rows; asks for the keys of the next."""
    group, dim, _, values_at, _, _, _ = shape
    each = -(-KEYS // (num_heads * (-(-group // MAX_ROWS)) * (dim // LINE)))
    asked = 0
    for head in range(num_heads):
        for r in range(head * group, head * group + group, MAX_ROWS):
            num_rows = min(MAX_ROWS, head * group + group - r)
            for i in range(0, dim, LINE):
                _ask(kv, ahead, asked, min(KEYS, asked + each), 0, width)
                asked += each
                add_values(
                    sums + 4 * (r * dim + i), 4 * dim, weights + 2 * r * KEYS, 2 * KEYS, kv,
                    places, (count + 1) // 2, values_at + head * dim + i, num_rows,
                )  # fmt: skip


@part
def _decode_one(out, out_at, qkv, query, kv, item, next_item, shape, num_heads, room, asked):
    """`num_heads` KV heads of one sequence; item = (table, length, low, place of the first head).

    asked = (places of the first round's tokens, room for as many); returns those of the next item.
    """
    group, dim, page_stride, values_at, block_size, _, kind = shape
    table, length, low, head_at = item
    sums, scores, weights, l, m = room
    places, ahead = asked
    rows, width = num_heads * group, values_at // block_size
    for r in range(rows):
        f32(m)[r] = MASKED
        store(f32(l), LANES * r, zero())
        for i in range(0, dim, LANES):
            store(f32(sums), r * dim + i, zero())
    for first in range(low // KEYS * KEYS, length, KEYS):
        # beyond `count` the last key again, with no weight
        count, begin = min(KEYS, length - first), max(0, low - first)
        _score_round(scores, qkv, query, kv, places, begin, count, rows, shape, num_heads * dim)
        for r in range(rows):
            weigh(scores, weights, m, l, sums, r, begin, count, dim, kind)
        if first + KEYS < length:
            find_places(
                ahead, table, first + KEYS, KEYS, length, page_stride, block_size, width, head_at
            )
        else:
            following, its_length, its_low, at = next_item
            find_places(
                ahead, following, its_low // KEYS * KEYS, KEYS, its_length, page_stride, block_size,
                width, at,
            )  # fmt: skip
        _weigh_values(sums, weights, kv, places, count, num_heads, shape, ahead, num_heads * dim)
        places, ahead = ahead, places
    for r in range(rows):
        share = splat(np.float32(1.0) / total(load(f32(l), LANES * r)))
        for i in range(0, dim, LINE):
            row, at = r * dim + i, out_at + r * dim + i
            low_half, high_half = in_order(load(f32(sums), row), load(f32(sums), row + LANES))
            store(out, at, mul(low_half, share))
            store(out, at + LANES, mul(high_half, share))
    return places, ahead


@part
def _item(sequence, head_at, context_len, block_table, max_blocks, window):
    """Block table, length and first visible token of a sequence, and where its head lies."""
    length = np.int64(i32(context_len)[sequence])
    low = max(0, length - window) if window > 0 else 0
    return block_table + 4 * sequence * max_blocks, length, low, head_at


@kernel
def decode(
    kind, out, qkv, row_size, num_heads, num_kv_heads, dim, kv, page_stride, block_size,
    sequences, num_sequences, query_start, context_len, block_table, max_blocks, scale, window,
    scratch, scratch_bytes, num_workers,
):  # fmt: skip
    """Addresses of the arguments of `kernels.reference.paged_attention`; one query a sequence.

    dim: a multiple of 32. scratch: address of bytes [num_workers, scratch_bytes], at a cache line,
    scratch_bytes as `scratch_bytes_for` says.
    """
    group, width = num_heads // num_kv_heads, num_kv_heads * dim
    # Few sequences: their heads are shared out, so that every worker has something to do.
    heads_each = num_kv_heads if num_sequences >= 2 * num_workers else 1
    items_each = num_kv_heads // heads_each
    rows = heads_each * group
    for worker in prange(num_workers):
        sums = scratch + worker * scratch_bytes
        scores = sums + 4 * rows * dim
        weights = scores + 4 * rows * KEYS
        l = weights + 2 * rows * KEYS
        places = l + 4 * LANES * rows
        room = (sums, scores, weights, l, places + 16 * KEYS)
        asked = (places, places + 8 * KEYS)
        shape = (group, dim, page_stride, block_size * width, block_size, scale, kind)
        num_items = num_sequences * items_each
        for n in range(worker, num_items, num_workers):
            # of this item and of the next, whose first keys are asked for before this one's end
            sequence = np.int64(i32(sequences)[n // items_each])
            token = np.int64(i32(query_start)[sequence])
            head = n % items_each * heads_each
            item = _item(sequence, head * dim, context_len, block_table, max_blocks, window)
            following = min(n + num_workers, num_items - 1)
            next_item = _item(
                np.int64(i32(sequences)[following // items_each]),
                following % items_each * heads_each * dim, context_len, block_table, max_blocks,
                window,
            )  # fmt: skip
            if n == worker:
                table, length, low, at = item
                find_places(
                    places, table, low // KEYS * KEYS, KEYS, length, page_stride, block_size, width,
                    at,
                )  # fmt: skip
            asked = _decode_one(
                elements(out, kind), (token * num_heads + head * group) * dim, elements(qkv, kind),
                token * row_size + head * group * dim, elements(kv, kind), item, next_item, shape,
                heads_each, room, asked,
            )  # fmt: skip
