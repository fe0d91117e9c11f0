"""BGMV and SGMV: shrink and expand of the rank rows of a span, fused over its targets.

A worker takes tiles of tokens of one slot. Tiles of two to four tokens (SGMV) read every rank row
once for all; single tokens (BGMV) stream each row once from memory, which is what bounds them:
while a line is used, the same line of the adapter that comes next is asked for. Both add in the
same order, so a token's result is the same to the bit whatever else is in its segment.

`y` is an address of fp32 scratch; `flat`, `x` and `out` are pointers of the model's type; `offsets`
and `scales` are addresses in the tables of `kernels.layout.RankRows`; `coming` is the address of
the offsets of the rows that come next, and how many they are.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    LINE,
    elements,
    f32,
    fma,
    fma_pairs,
    i32,
    i64,
    load_four,
    load_pair,
    load_part,
    mul,
    prefetch,
    splat,
    store,
    store_pair,
    store_part,
    total_each,
    zero,
)

TILE = 4
"""Tokens that share the reading of a rank row."""


@part
def _row(rows, index):
    """Where row `index` of those that come next lies, or the last one."""
    return i64(rows[0])[max(0, min(index, rows[1] - 1))]


@part
def _shrink_one(y, x, x_at, width, flat, offsets, scales, num_rows, coming):
    """y[i] = scaleᵢ · (x · aᵢ) for one token, four rows at a time."""
    full, last = width // LINE * LINE, num_rows - 1
    for r in range(0, num_rows, 4):
        r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
        a0, a1 = i64(offsets)[r], i64(offsets)[r1]
        a2, a3 = i64(offsets)[r2], i64(offsets)[r3]
        n0, n1, n2, n3 = _row(coming, r), _row(coming, r1), _row(coming, r2), _row(coming, r3)
        s0, s1, s2, s3 = zero(), zero(), zero(), zero()
        for k in range(0, full, LINE):
            prefetch(flat, n0 + k)
            prefetch(flat, n1 + k)
            prefetch(flat, n2 + k)
            prefetch(flat, n3 + k)
            s0 = fma_pairs(flat, a0 + k, x, x_at + k, s0)
            s1 = fma_pairs(flat, a1 + k, x, x_at + k, s1)
            s2 = fma_pairs(flat, a2 + k, x, x_at + k, s2)
            s3 = fma_pairs(flat, a3 + k, x, x_at + k, s3)
        for k in range(full, width, 16):
            n = min(16, width - k)
            v = load_part(x, x_at + k, n)
            s0 = fma(v, load_part(flat, a0 + k, n), s0)
            s1 = fma(v, load_part(flat, a1 + k, n), s1)
            s2 = fma(v, load_part(flat, a2 + k, n), s2)
            s3 = fma(v, load_part(flat, a3 + k, n), s3)
        totals = mul(total_each((s0, s1, s2, s3)), load_four(f32(scales), r, num_rows - r))
        store_part(f32(y), r, totals, 4)


@part
def _expand_one(out, at, width, y, flat, offsets, b_at, num_rows, coming, skip):
    """out[at:][:width] += Σᵢ y[i] · bᵢ for one token, 64 columns at a time."""
    ys, wide, whole = f32(y), width // 64 * 64, width // LINE * LINE
    for c in range(0, wide, 64):
        (e0, o0), (e1, o1) = load_pair(out, at + c), load_pair(out, at + c + LINE)
        for r in range(num_rows):
            b, n, v = i64(offsets)[r] + b_at + c, _row(coming, skip + r) + b_at + c, splat(ys[r])
            prefetch(flat, n)
            prefetch(flat, n + LINE)
            even, odd = load_pair(flat, b)
            e0, o0 = fma(v, even, e0), fma(v, odd, o0)
            even, odd = load_pair(flat, b + LINE)
            e1, o1 = fma(v, even, e1), fma(v, odd, o1)
        store_pair(out, at + c, e0, o0)
        store_pair(out, at + c + LINE, e1, o1)
    for c in range(wide, whole, LINE):
        e0, o0 = load_pair(out, at + c)
        for r in range(num_rows):
            v = splat(ys[r])
            even, odd = load_pair(flat, i64(offsets)[r] + b_at + c)
            e0, o0 = fma(v, even, e0), fma(v, odd, o0)
        store_pair(out, at + c, e0, o0)
    for c in range(whole, width, 16):
        _expand_rest(out, at + c, ys, flat, offsets, b_at + c, num_rows, min(16, width - c))


@part
def _expand_rest(out, at, ys, flat, offsets, b_at, num_rows, count):
    """As `_expand_one` for the last columns, `count` ≤ 16 of them."""
    v = load_part(out, at, count)
    for r in range(num_rows):
        v = fma(splat(ys[r]), load_part(flat, i64(offsets)[r] + b_at, count), v)
    store_part(out, at, v, count)


@part
def _shrink_tile(y, x, tokens, width, flat, offsets, scales, num_rows):
    """y[i // 4, j, i % 4] = scaleᵢ · (xⱼ · aᵢ) for TILE tokens, which begin at x[tokens[j]].

    Four rows by four tokens in 16 registers. The width is whole lines.
    """
    t0, t1, t2, t3 = tokens
    last = num_rows - 1
    for r in range(0, num_rows, 4):
        a, b = i64(offsets)[r], i64(offsets)[min(r + 1, last)]
        c, d = i64(offsets)[min(r + 2, last)], i64(offsets)[min(r + 3, last)]
        a0, b0, c0, d0 = zero(), zero(), zero(), zero()
        a1, b1, c1, d1 = zero(), zero(), zero(), zero()
        a2, b2, c2, d2 = zero(), zero(), zero(), zero()
        a3, b3, c3, d3 = zero(), zero(), zero(), zero()
        for k in range(0, width, LINE):
            a0 = fma_pairs(flat, a + k, x, t0 + k, a0)
            b0 = fma_pairs(flat, b + k, x, t0 + k, b0)
            c0 = fma_pairs(flat, c + k, x, t0 + k, c0)
            d0 = fma_pairs(flat, d + k, x, t0 + k, d0)
            a1 = fma_pairs(flat, a + k, x, t1 + k, a1)
            b1 = fma_pairs(flat, b + k, x, t1 + k, b1)
            c1 = fma_pairs(flat, c + k, x, t1 + k, c1)
            d1 = fma_pairs(flat, d + k, x, t1 + k, d1)
            a2 = fma_pairs(flat, a + k, x, t2 + k, a2)
            b2 = fma_pairs(flat, b + k, x, t2 + k, b2)
            c2 = fma_pairs(flat, c + k, x, t2 + k, c2)
            d2 = fma_pairs(flat, d + k, x, t2 + k, d2)
            a3 = fma_pairs(flat, a + k, x, t3 + k, a3)
            b3 = fma_pairs(flat, b + k, x, t3 + k, b3)
            c3 = fma_pairs(flat, c + k, x, t3 + k, c3)
            d3 = fma_pairs(flat, d + k, x, t3 + k, d3)
        sums = (a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3)
        store(f32(y), 4 * r, mul(total_each(sums), load_four(f32(scales), r, num_rows - r)))


@part
def _expand_tile(out, places, width, y, skip, flat, offsets, b_at, num_rows, ahead):
    """As `_expand_one` for TILE tokens, whose columns of out begin at places[j].

    y as `_shrink_tile` leaves it, from row `skip` on; ahead: how far the worker's next tile lies.
    """
    at0, at1, at2, at3 = places
    ys, whole = f32(y), width // LINE * LINE
    for c in range(0, whole, LINE):
        (e0, o0), (e1, o1) = load_pair(out, at0 + c), load_pair(out, at1 + c)
        (e2, o2), (e3, o3) = load_pair(out, at2 + c), load_pair(out, at3 + c)
        prefetch(out, at0 + c + ahead)
        prefetch(out, at1 + c + ahead)
        prefetch(out, at2 + c + ahead)
        prefetch(out, at3 + c + ahead)
        for r in range(num_rows):
            even, odd = load_pair(flat, i64(offsets)[r] + b_at + c)
            n = skip + r
            n += n // 4 * 12
            v0, v1, v2, v3 = splat(ys[n]), splat(ys[n + 4]), splat(ys[n + 8]), splat(ys[n + 12])
            e0, o0 = fma(v0, even, e0), fma(v0, odd, o0)
            e1, o1 = fma(v1, even, e1), fma(v1, odd, o1)
            e2, o2 = fma(v2, even, e2), fma(v2, odd, o2)
            e3, o3 = fma(v3, even, e3), fma(v3, odd, o3)
        store_pair(out, at0 + c, e0, o0)
        store_pair(out, at1 + c, e1, o1)
        store_pair(out, at2 + c, e2, o2)
        store_pair(out, at3 + c, e3, o3)


@part
def _in_lines(width, out_start, num_targets):
    """Whether inputs and columns of all targets come in whole lines; else tokens go one by one."""
    rest = width % LINE
    for t in range(1, num_targets + 1):
        rest += i32(out_start)[t] % LINE
    return rest == 0


@part
def _add_adapter(
    out, out_stride, x, x_stride, width, flat, token, count, row_ptr, offsets, scales, span, coming,
    ahead, scratch,
):  # fmt: skip
    """Add one slot's adapter to tokens token .. token + count, count ≤ TILE.

    row_ptr: address of the slot's entry for the span's first target; span: address and number of
    targets of out_start, and `_in_lines` of it; coming: the rows that the worker reads next; ahead:
    tokens from here to its next tile; scratch: address of y [TILE, max_rows], and max_rows.
    """
    out_start, num_targets, in_lines = span
    y, max_rows = scratch
    first = i32(row_ptr)[0]
    num_rows = i32(row_ptr)[num_targets] - first
    if num_rows == 0:
        return
    a, s, b_at = offsets + 8 * first, scales + 4 * first, (width + 7) // 8 * 8
    # the last token stands for those that the tile lacks: the same result is stored again
    j1, j2, j3 = min(1, count - 1), min(2, count - 1), min(3, count - 1)
    is_tile = count > 1 and in_lines
    if is_tile:
        t0, t1 = token * x_stride, (token + j1) * x_stride
        tokens = (t0, t1, (token + j2) * x_stride, (token + j3) * x_stride)
        _shrink_tile(y, x, tokens, width, flat, a, s, num_rows)
    else:
        for j in range(count):
            yj, xj = y + 4 * j * max_rows, (token + j) * x_stride
            _shrink_one(yj, x, xj, width, flat, a, s, num_rows, coming)
    for t in range(num_targets):
        skip = i32(row_ptr)[t] - first
        rows = i32(row_ptr)[t + 1] - first - skip
        at = token * out_stride + i32(out_start)[t]
        columns = i32(out_start)[t + 1] - i32(out_start)[t]
        bt = a + 8 * skip
        if is_tile:
            places = (at, at + j1 * out_stride, at + j2 * out_stride, at + j3 * out_stride)
            _expand_tile(out, places, columns, y, skip, flat, bt, b_at, rows, ahead * out_stride)
        else:
            for j in range(count):
                place, yj = at + j * out_stride, y + 4 * (skip + j * max_rows)
                _expand_one(out, place, columns, yj, flat, bt, b_at, rows, coming, skip)


def scratch_elements(max_rows: int) -> int:
    """Elements of fp32 scratch that a worker needs: y of a tile."""
    return TILE * _padded(max_rows)


def _padded(count: int) -> int:
    return -(-count // 16) * 16


@part
def _coming(
    next_segment, segment, num_segments, segment_slot, row_ptr, ptr_stride, first, num_targets,
    row_offset, table_stride,
):  # fmt: skip
    """The rows of the span that come after this segment's: address of their offsets, how many."""
    index = next_segment if next_segment < num_segments else segment
    slot = np.int64(i32(segment_slot)[index])
    ptr = i32(row_ptr + 4 * (slot * ptr_stride + first))
    count = np.int64(ptr[num_targets] - ptr[0])
    # a slot without rows here may begin past the end of its table
    begin = np.int64(ptr[0]) if count > 0 else np.int64(0)
    return row_offset + 8 * (slot * table_stride + begin), count


@kernel
def add_adapters(
    kind,
    out,
    out_stride,
    x,
    x_stride,
    width,
    flat,
    segment_start,
    segment_slot,
    num_segments,
    row_ptr,
    ptr_stride,
    first,
    row_offset,
    row_scale,
    table_stride,
    out_start,
    num_targets,
    max_rows,
    scratch,
    scratch_size,
    num_workers,
):
    """Addresses and strides (in elements) of the arguments of `kernels.reference.add_adapters`.

    scratch: address of fp32 [num_workers, scratch_size], scratch_size as `scratch_elements` says.
    Tiles go to workers in turn, since neighbours are likely to be of the same rank.
    """
    for worker in prange(num_workers):
        y_size = (max_rows + 15) // 16 * 16
        y = scratch + 4 * worker * scratch_size
        room = (y, y_size)
        span = (out_start, num_targets, _in_lines(width, out_start, num_targets))
        tile = -1
        for segment in range(num_segments):
            slot = np.int64(i32(segment_slot)[segment])
            stop = i32(segment_start)[segment + 1]
            ptr = row_ptr + 4 * (slot * ptr_stride + first)
            offsets = row_offset + 8 * slot * table_stride
            scales = row_scale + 4 * slot * table_stride
            for token in range(i32(segment_start)[segment], stop, TILE):
                tile += 1
                if tile % num_workers != worker:
                    continue
                count = min(TILE, stop - token)
                coming = _coming(
                    segment + (1 if stop - token > TILE else num_workers), segment, num_segments,
                    segment_slot, row_ptr, ptr_stride, first, num_targets, row_offset, table_stride,
                )  # fmt: skip
                _add_adapter(
                    elements(out, kind), out_stride, elements(x, kind), x_stride, width,
                    elements(flat, kind), token, count, ptr, offsets, scales, span, coming,
                    TILE * num_workers, room,
                )  # fmt: skip
