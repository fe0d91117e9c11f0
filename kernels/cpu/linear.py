"""The base model's linear layers: bf16, or int8 with inputs quantised as they come.

A packed weight is cut into panels of 32 outputs; a worker multiplies all rows of x by a panel while
the next one comes from memory, so that each weight is read once a step and the reading hides behind
the arithmetic. With more rows there is time left: it asks for the adapters that are added next.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.dots import PANEL, TILE_ROWS, load_counts, store_int8, tile_dots
from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    LINE,
    add,
    elements,
    f32,
    fma,
    i32,
    i64,
    largest,
    load,
    load_part,
    maximum,
    mul,
    prefetch,
    round_to_int,
    splat,
    store,
    store_part,
    sub,
    total,
    zero,
)

NEAR = 4096
"""Bytes ahead that a single tile of rows prefetches; more tiles have the time for a whole panel."""

INT8_ZERO = 128
"""What is added to an int8 weight, since the instruction takes unsigned weights."""


@part
def _row_table(reads, segment):
    """Address of the offsets of a segment's rank rows, and their number."""
    _, segment_slot, _, row_ptr, ptr_stride, offsets, table_stride, first, stop, _, _ = reads
    slot = np.int64(i32(segment_slot)[segment])
    begin = np.int64(i32(row_ptr)[slot * ptr_stride + first])
    count = i32(row_ptr)[slot * ptr_stride + stop] - begin
    return offsets + 8 * (slot * table_stride + begin), count


@part
def _ahead(panel, panel_bytes, tile, num_tiles, reads, place, stride):
    """What a tile asks for, of a panel's size: its address, and the place in `reads` after it.

    The only tile of a panel reads on from where it is; the first of several asks for the next
    panel, and the others for the rank rows that this worker adds afterwards: place is the segment
    and the row in it that come next. An address past the rows of a page may point to anything,
    since it is only asked for.
    """
    if num_tiles == 1:
        return panel + NEAR, place
    if tile == 0:
        return panel + panel_bytes, place
    segment, row = place
    if segment >= reads[2]:
        return panel, place
    offsets, num_rows = _row_table(reads, segment)
    num_each, num_left = max(1, panel_bytes // reads[9]), num_rows - row
    after = (segment, row + num_each) if num_left > num_each else (segment + stride, 0)
    if num_left <= 0:
        return panel, after
    return reads[0] + i64(offsets)[row] * 2, after


@part
def _begin_reads(reads, worker, num_workers, num_tiles, num_panels):
    """Where a worker begins to ask for rank rows, the stride of its segments, and rows a panel.

    The rows are for `_ask_rows`, beside a single tile; several tiles ask by themselves. Segments of
    several tiles of tokens are read by every worker, others by one in turn.
    """
    first, stride, num_rows = (0, 1, 0) if reads[10] else (worker, num_workers, 0)
    if num_tiles == 1:
        for segment in range(first, reads[2], stride):
            num_rows += _row_table(reads, segment)[1]
    return (np.int64(first), 0), stride, (num_rows + num_panels - 1) // max(1, num_panels)


@part
def _ask_rows(place, count, reads, stride, kind):
    """Prefetch the next `count` rank rows that this worker adds; returns the place after them."""
    segment, row = place
    flat, row_bytes = elements(reads[0], kind), reads[9]
    for _ in range(count):
        if segment >= reads[2]:
            break
        offsets, num_rows = _row_table(reads, segment)
        if row < num_rows:
            at = i64(offsets)[row]
            for line in range(0, row_bytes // 2, LINE):
                prefetch(flat, at + line)
        row += 1
        if row >= num_rows:
            segment, row = segment + stride, 0
    return segment, row


@part
def _put(out, at, vector, count):
    if count >= 16:
        store(out, at, vector)
    elif count > 0:
        store_part(out, at, vector, count)


@part
def _store_sums(out, at, out_size, sums, num_rows, bias, count):
    """out[at + n · out_size:][:count] = sums[n] + bias for n < num_rows."""
    for n in range(num_rows):
        for c in range(0, PANEL, 16):
            v = add(load(f32(sums), n * PANEL + c), load(f32(bias), c))
            _put(out, at + n * out_size + c, v, count - c)


@part
def _store_counts(out, at, out_size, counts, num_rows, bias, count, x_scale, x_sum, scale):
    """As `_store_sums`, for counts of int8: scaled by each row's and each output's scale."""
    for n in range(num_rows):
        minus = np.int64(f32(x_sum)[n]) * INT8_ZERO
        for c in range(0, PANEL, 16):
            v = mul(load_counts(counts, n * PANEL + c, minus), splat(f32(x_scale)[n]))
            v = add(mul(v, load(f32(scale), c)), load(f32(bias), c))
            _put(out, at + n * out_size + c, v, count - c)


@part
def _quantise_row(codes, x_scale, x_sum, x, at, width):
    """codes = round(x / scale) in -127 .. 127, its scale, and the sum of the codes.

    The scale of a row that is not finite is NaN, so that its results are.
    """
    top, probe = zero(), zero()
    for i in range(0, width, 16):
        v = load_part(x, at + i, min(16, width - i))
        top = maximum(top, maximum(v, sub(zero(), v)))
        probe = fma(v, zero(), probe)
    scale = max(largest(top), np.float32(1e-30)) / np.float32(127.0)
    inverse, sums = splat(np.float32(1.0) / scale), zero()
    for i in range(0, width, 16):
        v = round_to_int(mul(load_part(x, at + i, min(16, width - i)), inverse))
        store_int8(codes, i, v)
        sums = add(sums, v)
    f32(x_scale)[0] = scale + total(probe)
    f32(x_sum)[0] = total(sums)


@kernel
def multiply(
    kind, out_kind, out, x, x_size, panels, bias, num_tokens, width, num_outputs, scratch,
    scratch_bytes, reads, num_workers,
):  # fmt: skip
    """Out = x Wᵀ + bias for bf16 x and weights.

    Addresses of out [num_tokens, num_outputs] of out_kind, x (rows x_size elements apart), panels
    as `packed_weight.pack` makes them, bias fp32 [padded outputs]; scratch: of bytes [num_workers,
    scratch_bytes], as `scratch_bytes_for` says; reads: rank rows to ask for, as `_ahead` does
    (the address of the pages, then integers of `layout.RowReads`).
    """
    num_panels, panel_bytes = (num_outputs + PANEL - 1) // PANEL, width * PANEL * 2
    num_tiles = (num_tokens + TILE_ROWS - 1) // TILE_ROWS
    for worker in prange(num_workers):
        first_panel = num_panels * worker // num_workers
        last_panel = num_panels * (worker + 1) // num_workers
        place, stride, rows_each = _begin_reads(
            reads, worker, num_workers, num_tiles, last_panel - first_panel
        )
        sums = scratch + worker * scratch_bytes
        for p in range(first_panel, last_panel):
            panel = panels + p * panel_bytes
            place = _ask_rows(place, rows_each, reads, stride, kind)
            for tile in range(num_tiles):
                first = num_tokens * tile // num_tiles
                num_rows = num_tokens * (tile + 1) // num_tiles - first
                ahead, place = _ahead(panel, panel_bytes, tile, num_tiles, reads, place, stride)
                tile_dots(
                    sums, num_rows, x + 2 * first * x_size, 2 * x_size, panel, width // 2,
                    ahead, kind,
                )  # fmt: skip
                _store_sums(
                    elements(out, out_kind), first * num_outputs + p * PANEL, num_outputs, sums,
                    num_rows, bias + 4 * p * PANEL, num_outputs - p * PANEL,
                )  # fmt: skip


@kernel
def multiply_int8(
    code_kind, kind, out_kind, out, x, x_size, panels, scale, bias, num_tokens, width, num_outputs,
    scratch, scratch_bytes, reads, num_workers,
):  # fmt: skip
    """As `multiply` for int8 weights; each row of x gets a scale of its own.

    scale: address of fp32 [padded outputs]; code_kind: a uint8. Every worker quantises all rows
    for itself, which costs less than meeting another time.
    """
    num_panels, panel_bytes = (num_outputs + PANEL - 1) // PANEL, width * PANEL
    num_tiles = (num_tokens + TILE_ROWS - 1) // TILE_ROWS
    codes_size = (width + 63) // 64 * 64
    for worker in prange(num_workers):
        first_panel = num_panels * worker // num_workers
        last_panel = num_panels * (worker + 1) // num_workers
        place, stride, rows_each = _begin_reads(
            reads, worker, num_workers, num_tiles, last_panel - first_panel
        )
        counts = scratch + worker * scratch_bytes
        x_scale = counts + 4 * TILE_ROWS * PANEL
        x_sum = x_scale + 4 * num_tokens
        codes = (x_sum + 4 * num_tokens + 63) // 64 * 64
        for n in range(num_tokens):
            _quantise_row(
                codes + n * codes_size, x_scale + 4 * n, x_sum + 4 * n, elements(x, kind),
                n * x_size, width,
            )  # fmt: skip
        for p in range(first_panel, last_panel):
            panel = panels + p * panel_bytes
            place = _ask_rows(place, rows_each, reads, stride, kind)
            for tile in range(num_tiles):
                first = num_tokens * tile // num_tiles
                num_rows = num_tokens * (tile + 1) // num_tiles - first
                ahead, place = _ahead(panel, panel_bytes, tile, num_tiles, reads, place, stride)
                tile_dots(
                    counts, num_rows, codes + first * codes_size, codes_size, panel, width // 4,
                    ahead, code_kind,
                )  # fmt: skip
                _store_counts(
                    elements(out, out_kind), first * num_outputs + p * PANEL, num_outputs, counts,
                    num_rows, bias + 4 * p * PANEL, num_outputs - p * PANEL, x_scale + 4 * first,
                    x_sum + 4 * first, scale + 4 * p * PANEL,
                )  # fmt: skip


def scratch_bytes_for(num_tokens: int, width: int, is_int8: bool) -> int:
    """Bytes of scratch that a worker needs: a tile's sums, and x as int8 with scales and sums."""
    codes = num_tokens * (8 + -(-width // 64) * 64) + 64 if is_int8 else 0
    return 4 * TILE_ROWS * PANEL + -(-codes // 64) * 64
