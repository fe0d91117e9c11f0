"""BGMV and SGMV: shrink and expand of the rank rows of a span, fused over its targets.

A worker takes tiles of tokens of one slot. Tiles of four tokens (SGMV) read every rank row once for
the four; single tokens (BGMV) stream each row once from memory, which is what bounds them. Both add
in the same order, so a token's result is the same to the bit whatever else is in its segment.

Arguments named `x`, `y`, `sums` are addresses of fp32 scratch; `flat` and `out` are pointers of the
model's type; `offsets` and `scales` are addresses in the tables of `kernels.layout.RankRows`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    elements,
    f32,
    fma,
    i32,
    i64,
    load,
    load_part,
    prefetch,
    splat,
    store,
    store_part,
    total,
    zero,
)

TILE = 4
"""Tokens that share the reading of a rank row."""


@part
def _shrink_one(y, x, width, flat, offsets, scales, num_rows):
    """y[i] = scaleᵢ · (x · aᵢ) for one token, four rows at a time."""
    xs, full = f32(x), width // 16 * 16
    for r in range(0, num_rows, 4):
        last = num_rows - 1
        i1, i2, i3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
        a0, a1 = i64(offsets)[r], i64(offsets)[i1]
        a2, a3 = i64(offsets)[i2], i64(offsets)[i3]
        n0, n1 = i64(offsets)[min(r + 4, last)], i64(offsets)[min(r + 5, last)]
        n2, n3 = i64(offsets)[min(r + 6, last)], i64(offsets)[min(r + 7, last)]
        s0, s1, s2, s3 = zero(), zero(), zero(), zero()
        for k in range(0, full, 16):
            prefetch(flat, n0 + k)
            prefetch(flat, n1 + k)
            prefetch(flat, n2 + k)
            prefetch(flat, n3 + k)
            v = load(xs, k)
            s0, s1 = fma(v, load(flat, a0 + k), s0), fma(v, load(flat, a1 + k), s1)
            s2, s3 = fma(v, load(flat, a2 + k), s2), fma(v, load(flat, a3 + k), s3)
        if full < width:
            v, n = load(xs, full), width - full
            s0 = fma(v, load_part(flat, a0 + full, n), s0)
            s1 = fma(v, load_part(flat, a1 + full, n), s1)
            s2 = fma(v, load_part(flat, a2 + full, n), s2)
            s3 = fma(v, load_part(flat, a3 + full, n), s3)
        f32(y)[i3] = total(s3) * f32(scales)[i3]
        f32(y)[i2] = total(s2) * f32(scales)[i2]
        f32(y)[i1] = total(s1) * f32(scales)[i1]
        f32(y)[r] = total(s0) * f32(scales)[r]


@part
def _shrink_tile(y, max_rows, x, x_size, width, flat, offsets, scales, num_rows):
    """As `_shrink_one` for TILE tokens: y [TILE, max_rows], x [TILE, x_size]."""
    ys, full = f32(y), width // 16 * 16
    x0, x1 = f32(x), f32(x + 4 * x_size)
    x2, x3 = f32(x + 8 * x_size), f32(x + 12 * x_size)
    for r in range(num_rows):
        a = i64(offsets)[r]
        s0, s1, s2, s3 = zero(), zero(), zero(), zero()
        for k in range(0, full, 16):
            row = load(flat, a + k)
            s0, s1 = fma(load(x0, k), row, s0), fma(load(x1, k), row, s1)
            s2, s3 = fma(load(x2, k), row, s2), fma(load(x3, k), row, s3)
        if full < width:
            row = load_part(flat, a + full, width - full)
            s0, s1 = fma(load(x0, full), row, s0), fma(load(x1, full), row, s1)
            s2, s3 = fma(load(x2, full), row, s2), fma(load(x3, full), row, s3)
        scale = f32(scales)[r]
        ys[r], ys[max_rows + r] = total(s0) * scale, total(s1) * scale
        ys[2 * max_rows + r], ys[3 * max_rows + r] = total(s2) * scale, total(s3) * scale


@part
def _expand_one(out, at, width, sums, y, flat, offsets, b_at, num_rows):
    """out[at:][:width] += Σᵢ y[i] · bᵢ, streaming four rows at a time over the sums."""
    total_at, ys = f32(sums), f32(y)
    full = width // 16 * 16
    for c in range(0, width, 16):
        store(total_at, c, load_part(out, at + c, min(16, width - c)))
    whole = num_rows // 4 * 4
    for r in range(0, whole, 4):
        b0, b1 = i64(offsets)[r] + b_at, i64(offsets)[r + 1] + b_at
        b2, b3 = i64(offsets)[r + 2] + b_at, i64(offsets)[r + 3] + b_at
        y0, y1, y2, y3 = splat(ys[r]), splat(ys[r + 1]), splat(ys[r + 2]), splat(ys[r + 3])
        last = num_rows - 1
        n0, n1 = i64(offsets)[min(r + 4, last)] + b_at, i64(offsets)[min(r + 5, last)] + b_at
        n2, n3 = i64(offsets)[min(r + 6, last)] + b_at, i64(offsets)[min(r + 7, last)] + b_at
        for c in range(0, full, 16):
            prefetch(flat, n0 + c)
            prefetch(flat, n1 + c)
            prefetch(flat, n2 + c)
            prefetch(flat, n3 + c)
            v = fma(y1, load(flat, b1 + c), fma(y0, load(flat, b0 + c), load(total_at, c)))
            v = fma(y3, load(flat, b3 + c), fma(y2, load(flat, b2 + c), v))
            store(total_at, c, v)
        if full < width:
            n = width - full
            v = fma(y0, load_part(flat, b0 + full, n), load(total_at, full))
            v = fma(y1, load_part(flat, b1 + full, n), v)
            v = fma(y2, load_part(flat, b2 + full, n), v)
            store(total_at, full, fma(y3, load_part(flat, b3 + full, n), v))
    for r in range(whole, num_rows):
        b, weight = i64(offsets)[r] + b_at, splat(ys[r])
        for c in range(0, width, 16):
            row = load_part(flat, b + c, min(16, width - c))
            store(total_at, c, fma(weight, row, load(total_at, c)))
    for c in range(0, width, 16):
        store_part(out, at + c, load(total_at, c), min(16, width - c))


@part
def _expand_tile(out, at, stride, width, y, max_rows, flat, offsets, b_at, num_rows):
    """As `_expand_one` for TILE tokens, whose rows of out lie `stride` apart."""
    y0, y1 = f32(y), f32(y + 4 * max_rows)
    y2, y3 = f32(y + 8 * max_rows), f32(y + 12 * max_rows)
    for c in range(0, width // 16 * 16, 16):
        p0, p1, p2, p3 = at + c, at + c + stride, at + c + 2 * stride, at + c + 3 * stride
        s0, s1, s2, s3 = load(out, p0), load(out, p1), load(out, p2), load(out, p3)
        for r in range(num_rows):
            b = load(flat, i64(offsets)[r] + b_at + c)
            s0, s1 = fma(splat(y0[r]), b, s0), fma(splat(y1[r]), b, s1)
            s2, s3 = fma(splat(y2[r]), b, s2), fma(splat(y3[r]), b, s3)
        store(out, p0, s0)
        store(out, p1, s1)
        store(out, p2, s2)
        store(out, p3, s3)
    n, c = width % 16, width // 16 * 16
    if n:
        for j in range(TILE):
            place, ys = at + c + j * stride, f32(y + 4 * j * max_rows)
            s0 = load_part(out, place, n)
            for r in range(num_rows):
                s0 = fma(splat(ys[r]), load_part(flat, i64(offsets)[r] + b_at + c, n), s0)
            store_part(out, place, s0, n)


@part
def _add_adapter(
    out, out_stride, x, x_stride, width, flat, token, count, row_ptr, offsets, scales, span, scratch
):
    """Add one slot's adapter to tokens token .. token + count, count ≤ TILE.

    row_ptr: address of the slot's entry for the span's first target; span: address and number of
    targets of out_start; scratch: addresses of x [TILE, x_size], y [TILE, max_rows] and sums.
    """
    out_start, num_targets = span
    xs, x_size, y, max_rows, sums = scratch
    first = i32(row_ptr)[0]
    num_rows = i32(row_ptr)[num_targets] - first
    if num_rows == 0:
        return
    for j in range(count):
        for i in range(0, width, 16):
            v = load_part(x, (token + j) * x_stride + i, min(16, width - i))
            store(f32(xs), j * x_size + i, v)
    a, s = offsets + 8 * first, scales + 4 * first
    if count == TILE:
        _shrink_tile(y, max_rows, xs, x_size, width, flat, a, s, num_rows)
    else:
        for j in range(count):
            _shrink_one(y + 4 * j * max_rows, xs + 4 * j * x_size, width, flat, a, s, num_rows)
    b_at = (width + 7) // 8 * 8
    for t in range(num_targets):
        skip = i32(row_ptr)[t] - first
        rows = i32(row_ptr)[t + 1] - first - skip
        at = token * out_stride + i32(out_start)[t]
        columns = i32(out_start)[t + 1] - i32(out_start)[t]
        yt, bt = y + 4 * skip, a + 8 * skip
        if rows == 0:
            continue
        if count == TILE:
            _expand_tile(out, at, out_stride, columns, yt, max_rows, flat, bt, b_at, rows)
        else:
            for j in range(count):
                place, yj = at + j * out_stride, yt + 4 * j * max_rows
                _expand_one(out, place, columns, sums, yj, flat, bt, b_at, rows)


def scratch_elements(in_features: int, max_columns: int, max_rows: int) -> int:
    """Elements of fp32 scratch that a worker needs: x and y of a tile, the sums of one token."""
    return TILE * (_padded(in_features) + _padded(max_rows)) + _padded(max_columns)


def _padded(count: int) -> int:
    return -(-count // 16) * 16


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
        x_size = (width + 15) // 16 * 16
        y_size = (max_rows + 15) // 16 * 16
        xs = scratch + 4 * worker * scratch_size
        y = xs + 4 * TILE * x_size
        room = (xs, x_size, y, y_size, y + 4 * TILE * y_size)
        span = (out_start, num_targets)
        tile = 0
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
                _add_adapter(
                    elements(out, kind), out_stride, elements(x, kind), x_stride, width,
                    elements(flat, kind), token, count, ptr, offsets, scales, span, room,
                )  # fmt: skip
