"""Paged attention with an online softmax over rounds of 64 keys, for decode and for prefill.

A worker takes one KV head of one sequence (in prefill, of one tile of its queries), with all query
heads of the group: rows r = token · group + head. In decode the few rows take dot products with the
keys as they lie in their pages. In prefill a round of keys is widened and transposed once and
serves all rows of the tile by outer products, four rows at a time.

Scratch is fp32 and passed as addresses: q and acc [rows, padded], m and l [rows], s [4, KEYS], in
decode [rows, KEYS] and the places of the keys; the head size is padded with zeros to a multiple of
16.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    LINE,
    add,
    elements,
    exp,
    f32,
    fma,
    fma_pairs,
    i32,
    i64,
    largest,
    load,
    load_pair,
    load_part,
    maximum,
    mul,
    prefetch,
    splat,
    store,
    store_pair,
    store_part,
    sub,
    total,
    zero,
)

KEYS = 64
"""Keys of one round of the online softmax."""
QUERIES = 32
"""Query tokens of one tile of prefill."""
AHEAD = 8
"""How many tokens ahead decode asks for keys and values: blocks lie far apart in memory."""
MASKED = np.float32(-1e30)
"""The score of a key that a row may not see; its weight underflows."""


@part
def _begin_rows(q, m, l, acc, qkv, at, row_size, dim, padded, num_rows, group, scale):
    """q = scale · the queries from qkv[at:]; m, l, acc of rows that have seen no key."""
    factor = splat(np.float32(scale))
    for r in range(num_rows):
        place = at + r // group * row_size + r % group * dim
        f32(m)[r], f32(l)[r] = MASKED, np.float32(0.0)
        for i in range(0, padded, 16):
            v = mul(load_part(qkv, place + i, min(16, dim - i)), factor)
            store(f32(q), r * padded + i, v)
            store(f32(acc), r * padded + i, zero())


@part
def _end_rows(out, at, row_size, l, acc, dim, padded, num_rows, group):
    """Out = acc / l."""
    for r in range(num_rows):
        place = at + r // group * row_size + r % group * dim
        share = splat(np.float32(1.0) / f32(l)[r])
        for i in range(0, padded, 16):
            v = mul(load(f32(acc), r * padded + i), share)
            store_part(out, place + i, v, min(16, dim - i))


@part
def _to_weights(s, m, l, acc, padded, low, high):
    """Turn one row's scores into weights of keys low .. high; rescale its l and acc to the new m.

    s, m, l, acc: addresses of the row's own.
    """
    scores = f32(s)
    for j in range(low):
        scores[j] = MASKED
    for j in range(max(low, high), KEYS):
        scores[j] = MASKED
    top = splat(f32(m)[0])
    for j in range(0, KEYS, 16):
        top = maximum(top, load(scores, j))
    new_max = largest(top)
    rescale = np.exp(f32(m)[0] - new_max)
    shift, sums = splat(new_max), zero()
    for j in range(0, KEYS, 16):
        weights = exp(sub(load(scores, j), shift))
        store(scores, j, weights)
        sums = add(sums, weights)
    f32(m)[0] = new_max
    f32(l)[0] = f32(l)[0] * rescale + total(sums)
    if rescale != np.float32(1.0):
        for i in range(0, padded, 16):
            store(f32(acc), i, mul(load(f32(acc), i), splat(rescale)))


@part
def _key_at(table, token, page_stride, block_size, width):
    """Element of the KV cache where the keys of a token begin."""
    page = np.int64(i32(table)[token // block_size])
    return page * page_stride + token % block_size * width


@part
def find_places(places, table, first, count, length, page_stride, block_size, width, at):
    """places[j] = at + the element where the keys of token min(first + j, length - 1) begin."""
    block, offset = first // block_size, first % block_size
    page = np.int64(i32(table)[block]) * page_stride + at
    for j in range(count):
        i64(places)[j] = page + offset * width
        if first + j + 1 < length:
            offset += 1
            if offset == block_size:
                block, offset = block + 1, 0
                page = np.int64(i32(table)[block]) * page_stride + at


@part
def _score_keys(s, qkv, q_at, kv, places, begin, count, group, dim, rows, width, scale, values_at):
    """s[r, j] = scale · q[r] · k[j] for keys begin .. count; asks for keys and values AHEAD."""
    full = dim // LINE * LINE
    for j in range(begin, count):
        at, ahead = i64(places)[j], i64(places)[j + AHEAD]
        for i in range(0, width, LINE):
            prefetch(kv, ahead + i)
            prefetch(kv, ahead + values_at + i)
        for r in range(rows):
            key, query, sums = at + r // group * dim, q_at + r * dim, zero()
            for i in range(0, full, LINE):
                sums = fma_pairs(kv, key + i, qkv, query + i, sums)
            for i in range(full, dim, 16):
                n = min(16, dim - i)
                sums = fma(load_part(kv, key + i, n), load_part(qkv, query + i, n), sums)
            f32(s)[r * KEYS + j] = total(sums) * scale


@part
def _add_values(acc, s, kv, places, begin, count, at, dim):
    """acc += Σⱼ s[j] · values[j] for one row; acc in the order of `load_pair`."""
    full, weights, sums = dim // LINE * LINE, f32(s), f32(acc)
    for i in range(0, full, LINE):
        even, odd = load(sums, i), load(sums, i + 16)
        for j in range(begin, count):
            weight = splat(weights[j])
            e, o = load_pair(kv, i64(places)[j] + at + i)
            even, odd = fma(weight, e, even), fma(weight, o, odd)
        store(sums, i, even)
        store(sums, i + 16, odd)
    for i in range(full, dim, 16):
        n, v = min(16, dim - i), load(sums, i)
        for j in range(begin, count):
            v = fma(splat(weights[j]), load_part(kv, i64(places)[j] + at + i, n), v)
        store(sums, i, v)


@part
def _decode_one(out, out_at, qkv, q_at, kv, table, length, low, shape, heads, scratch):
    """The KV heads first .. first + count of one sequence with one query, heads = (first, count).

    Reads the cache once, in the order in which it lies: all heads of a token, token by token.
    """
    group, dim, padded, page_stride, block_size, width, scale = shape
    first_head, num_heads = heads
    m, l, acc, s, places = scratch
    rows, full = num_heads * group, dim // LINE * LINE
    head_at, values_at = first_head * dim, block_size * width
    for r in range(rows):
        f32(m)[r], f32(l)[r] = MASKED, np.float32(0.0)
        for i in range(0, padded, 16):
            store(f32(acc), r * padded + i, zero())
    for first in range(low // KEYS * KEYS, length, KEYS):
        count, begin = min(KEYS, length - first), max(0, low - first)
        find_places(
            places, table, first, count + AHEAD, length, page_stride, block_size, width, head_at
        )
        _score_keys(
            s, qkv, q_at + head_at * group, kv, places, begin, count, group, dim, rows,
            num_heads * dim, scale, values_at,
        )  # fmt: skip
        for r in range(rows):
            row, weights = acc + 4 * r * padded, s + 4 * r * KEYS
            _to_weights(weights, m + 4 * r, l + 4 * r, row, padded, begin, count)
            at = values_at + r // group * dim
            _add_values(row, weights, kv, places, begin, count, at, dim)
    for r in range(rows):
        at, row = out_at + (head_at * group + r * dim), acc + 4 * r * padded
        share = splat(np.float32(1.0) / f32(l)[r])
        for i in range(0, full, LINE):
            even, odd = mul(load(f32(row), i), share), mul(load(f32(row), i + 16), share)
            store_pair(out, at + i, even, odd)
        for i in range(full, dim, 16):
            store_part(out, at + i, mul(load(f32(row), i), share), min(16, dim - i))


@part
def _widen_round(
    k, v, kv, table, first, count, page_stride, block_size, width, head_at, dim, padded
):
    """Keys first .. first + count to k [padded, KEYS], transposed; values to v [KEYS, padded]."""
    line = k + 4 * padded * KEYS
    for j in range(count):
        at = _key_at(table, first + j, page_stride, block_size, width) + head_at
        for i in range(0, padded, 16):
            n = min(16, dim - i)
            store(f32(line), i, load_part(kv, at + i, n))
            store(f32(v), j * padded + i, load_part(kv, at + block_size * width + i, n))
        for i in range(dim):
            f32(k)[i * KEYS + j] = f32(line)[i]


@part
def _score_four(s, q, k, padded, dim):
    """s[0..3, j] = q[0..3] · k[j] for all KEYS."""
    q0, q1, q2, q3 = f32(q), f32(q + 4 * padded), f32(q + 8 * padded), f32(q + 12 * padded)
    keys, out = f32(k), f32(s)
    for j in range(0, KEYS, 32):
        a0, a1, a2, a3 = zero(), zero(), zero(), zero()
        b0, b1, b2, b3 = zero(), zero(), zero(), zero()
        for i in range(dim):
            x, y = load(keys, i * KEYS + j), load(keys, i * KEYS + j + 16)
            w0, w1, w2, w3 = splat(q0[i]), splat(q1[i]), splat(q2[i]), splat(q3[i])
            a0, a1, a2, a3 = fma(w0, x, a0), fma(w1, x, a1), fma(w2, x, a2), fma(w3, x, a3)
            b0, b1, b2, b3 = fma(w0, y, b0), fma(w1, y, b1), fma(w2, y, b2), fma(w3, y, b3)
        store(out, j, a0)
        store(out, j + 16, b0)
        store(out, j + KEYS, a1)
        store(out, j + KEYS + 16, b1)
        store(out, j + 2 * KEYS, a2)
        store(out, j + 2 * KEYS + 16, b2)
        store(out, j + 3 * KEYS, a3)
        store(out, j + 3 * KEYS + 16, b3)


@part
def _add_values_four(acc, s, v, padded, count):
    """acc[0..3] += s[0..3] · v."""
    values, out, w = f32(v), f32(acc), f32(s)
    for i in range(0, padded, 16):
        a0, a1 = load(out, i), load(out, padded + i)
        a2, a3 = load(out, 2 * padded + i), load(out, 3 * padded + i)
        for j in range(count):
            x = load(values, j * padded + i)
            a0, a1 = fma(splat(w[j]), x, a0), fma(splat(w[KEYS + j]), x, a1)
            a2, a3 = fma(splat(w[2 * KEYS + j]), x, a2), fma(splat(w[3 * KEYS + j]), x, a3)
        store(out, i, a0)
        store(out, padded + i, a1)
        store(out, 2 * padded + i, a2)
        store(out, 3 * padded + i, a3)


@part
def _prefill_tile(
    out, out_at, out_size, qkv, q_at, row_size, kv, table, position, num_queries, window, shape,
    scratch,
):  # fmt: skip
    """One KV head of `num_queries` queries, the first of which stands at `position`."""
    group, dim, padded, page_stride, block_size, width, head_at, scale = shape
    q, m, l, acc, s, k, v = scratch
    rows = num_queries * group
    _begin_rows(q, m, l, acc, qkv, q_at, row_size, dim, padded, rows, group, scale)
    oldest = max(0, position - window + 1) if window > 0 else 0
    length = position + num_queries
    for first in range(oldest // KEYS * KEYS, length, KEYS):
        count = min(KEYS, length - first)
        _widen_round(
            k, v, kv, table, first, count, page_stride, block_size, width, head_at, dim, padded
        )
        for row in range(0, rows, 4):
            num_live = min(4, rows - row)
            if position + (row + num_live - 1) // group < first:
                continue
            place = 4 * row * padded
            _score_four(s, q + place, k, padded, dim)
            for r in range(num_live):
                at = row + r
                newest = position + at // group
                low = newest - window + 1 - first if window > 0 else 0
                high = min(count, newest + 1 - first)
                _to_weights(
                    s + 4 * r * KEYS, m + 4 * at, l + 4 * at, acc + 4 * at * padded, padded,
                    min(KEYS, max(0, low)), max(0, high),
                )  # fmt: skip
            _add_values_four(acc + place, s, v, padded, count)
    _end_rows(out, out_at, out_size, l, acc, dim, padded, rows, group)


def scratch_elements(num_heads: int, num_kv_heads: int, dim: int) -> int:
    """Elements of fp32 scratch that a worker of decode or prefill needs, whichever is more."""
    padded = -(-dim // 16) * 16
    tile_rows = -(-QUERIES * (num_heads // num_kv_heads) // 4) * 4
    tile = 2 * tile_rows * (padded + 1) + 4 * KEYS + 2 * padded * KEYS + padded
    places = 2 * (KEYS + AHEAD)
    return max(num_heads * (padded + 2 + KEYS) + places, tile) // 16 * 16 + 16


@kernel
def decode(
    kind, out, qkv, row_size, num_heads, num_kv_heads, dim, kv, page_stride, block_size,
    sequences, num_sequences, query_start, context_len, block_table, max_blocks, scale, window,
    scratch, scratch_size, num_workers,
):  # fmt: skip
    """Addresses of the arguments of `kernels.reference.paged_attention`; one query a sequence.

    scratch: address of fp32 [num_workers, scratch_size], scratch_size as `scratch_elements` says.
    """
    group, padded = num_heads // num_kv_heads, (dim + 15) // 16 * 16
    # Few sequences: their heads are shared out, so that every worker has something to do.
    heads_each = num_kv_heads if num_sequences >= 2 * num_workers else 1
    items_each = num_kv_heads // heads_each
    rows = heads_each * group
    for worker in prange(num_workers):
        acc = scratch + 4 * worker * scratch_size
        s = acc + 4 * rows * padded
        m = s + 4 * rows * KEYS
        room = (m, m + 4 * rows, acc, s, (m + 8 * rows + 7) // 8 * 8)
        for item in range(worker, num_sequences * items_each, num_workers):
            sequence = np.int64(i32(sequences)[item // items_each])
            heads = (item % items_each * heads_each, heads_each)
            token = np.int64(i32(query_start)[sequence])
            length = np.int64(i32(context_len)[sequence])
            low = max(0, length - window) if window > 0 else 0
            table = block_table + 4 * sequence * max_blocks
            width = num_kv_heads * dim
            shape = (group, dim, padded, page_stride, block_size, width, scale)
            _decode_one(
                elements(out, kind), token * num_heads * dim, elements(qkv, kind),
                token * row_size, elements(kv, kind), table, length, low, shape, heads, room,
            )  # fmt: skip


@kernel
def prefill(
    kind, out, qkv, row_size, num_heads, num_kv_heads, dim, kv, page_stride, block_size,
    sequences, num_sequences, query_start, context_len, block_table, max_blocks, scale, window,
    scratch, scratch_size, num_workers,
):  # fmt: skip
    """As `decode`, for sequences with any number of queries; tiles go to workers in turn."""
    group, padded = num_heads // num_kv_heads, (dim + 15) // 16 * 16
    rows = (QUERIES * group + 3) // 4 * 4
    for worker in prange(num_workers):
        q = scratch + 4 * worker * scratch_size
        acc = q + 4 * rows * padded
        s = acc + 4 * rows * padded
        v = s + 16 * KEYS
        k = v + 4 * padded * KEYS
        m = k + 4 * padded * KEYS + 4 * padded
        room = (q, m, m + 4 * rows, acc, s, k, v)
        width, item = num_kv_heads * dim, 0
        for index in range(num_sequences):
            sequence = np.int64(i32(sequences)[index])
            start = np.int64(i32(query_start)[sequence])
            stop = np.int64(i32(query_start)[sequence + 1])
            offset = np.int64(i32(context_len)[sequence]) - stop
            table = block_table + 4 * sequence * max_blocks
            for token in range(start, stop, QUERIES):
                count = min(QUERIES, stop - token)
                for head in range(num_kv_heads):
                    item += 1
                    if item % num_workers != worker:
                        continue
                    shape = (group, dim, padded, page_stride, block_size, width, head * dim, scale)
                    out_at = (token * num_heads + head * group) * dim
                    q_at = token * row_size + head * group * dim
                    _prefill_tile(
                        elements(out, kind), out_at, num_heads * dim, elements(qkv, kind), q_at,
                        row_size, elements(kv, kind), table, token + offset, count, window, shape,
                        room,
                    )  # fmt: skip
