"""SGMV: adapter shrink and expand on tensor cores, for segments of many tokens of one adapter."""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import AdapterIndex, RankRows, TargetSpan, aligned
from kernels.triton.launch import MAX_VECTOR, cdiv
from kernels.triton.span import UNSPECIALIZED, find_column_block, num_column_blocks
from kernels.triton.tiles import MAX_SPLITS, Tiling, num_tiles


def sgmv_shrink(
    y: Tensor,
    x: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
    tiling: Tiling,
) -> None:
    """y[s, t, i] = the part of x[num_base + t] · aᵢ that lies in split s of the inputs.

    Shapes as in `bgmv_shrink`; a program computes a tile of one segment's tokens by rank rows,
    products of x and a as they are, sums in fp32. (Punica, arXiv:2310.18547, sec. 4)
    """
    num_splits, num_tokens, _ = y.shape
    num_segments, tile = len(index.segment_slot), tiling.shrink
    grid = (num_tiles(num_tokens, num_segments, tile.tokens), tiling.row_programs, num_splits)
    _sgmv_shrink_kernel[grid](
        y,
        x,
        storage,
        rows.row_ptr,
        rows.row_offset,
        index.segment_start,
        index.segment_slot,
        num_segments,
        index.num_base,
        span.first,
        cdiv(cdiv(x.shape[1], tile.columns), num_splits),
        x.stride(0),
        y.stride(0),
        y.stride(1),
        rows.row_ptr.stride(0),
        rows.row_offset.stride(0),
        IN_FEATURES=x.shape[1],
        NUM_TARGETS=len(span.out_start) - 1,
        BLOCK_T=tile.tokens,
        BLOCK_R=tile.rows,
        BLOCK_I=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


def sgmv_expand(
    out: Tensor,
    y: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
    in_features: int,
    tiling: Tiling,
) -> None:
    """out[num_base + t, target's columns] += Σᵢ scaleᵢ · (Σₛ y[s, t, i]) · bᵢ, rounded once.

    out [T, O], in place; y as `sgmv_shrink` leaves it. y stays fp32 in effect: it enters the
    tensor cores as the sum of two 16-bit parts. (Punica, arXiv:2310.18547, sec. 4)
    """
    num_splits, num_tokens, _ = y.shape
    num_segments, tile = len(index.segment_slot), tiling.expand
    grid = (
        num_tiles(num_tokens, num_segments, tile.tokens),
        num_column_blocks(span.out_start, tile.columns),
    )
    _sgmv_expand_kernel[grid](
        out,
        y,
        storage,
        rows.row_ptr,
        rows.row_offset,
        rows.row_scale,
        index.segment_start,
        index.segment_slot,
        num_segments,
        index.num_base,
        span.first,
        num_splits,
        out.stride(0),
        y.stride(0),
        y.stride(1),
        rows.row_ptr.stride(0),
        rows.row_offset.stride(0),
        ALIGNED_IN=aligned(in_features),
        OUT_START=span.out_start,
        NUM_TARGETS=len(span.out_start) - 1,
        VECTOR=all(start % MAX_VECTOR == 0 for start in span.out_start),
        MAX_SPLITS=MAX_SPLITS["sgmv"],
        BLOCK_T=tile.tokens,
        BLOCK_R=tile.rows,
        BLOCK_O=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        num_stages=tile.num_stages,
    )


@triton.jit
def find_tile(
    tile: tl.tensor,
    segment_start_ptr: tl.tensor,
    num_segments: tl.tensor,
    num_base: tl.tensor,
    BLOCK_T: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The segment of a tile of BLOCK_T tokens, the tile's first token and the segment's end.

    Segment s has the tiles from (segment_start[s] - num_base) // BLOCK_T + s on, up to those of
    the next one: as many as it needs, whatever its length, and at most one more, which begins
    past its end. So a launch has N // BLOCK_T + S programs for N tokens in S segments, however
    skewed they are, and each launch may cut its own tiles from one index.
    """
    BLOCK_S: tl.constexpr = 128
    segment = -1
    for s in range(0, num_segments, BLOCK_S):
        candidate = s + tl.arange(0, BLOCK_S)
        exists = candidate < num_segments
        start = tl.load(segment_start_ptr + candidate, mask=exists, other=0)
        begun = (start - num_base) // BLOCK_T + candidate <= tile
        segment += tl.sum((begun & exists).to(tl.int32))
    start = tl.load(segment_start_ptr + segment)
    first_tile = (start - num_base) // BLOCK_T + segment
    return segment, start + (tile - first_tile) * BLOCK_T, tl.load(segment_start_ptr + segment + 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sgmv_shrink_kernel(
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    storage_ptr: tl.tensor,
    row_ptr_ptr: tl.tensor,
    row_offset_ptr: tl.tensor,
    segment_start_ptr: tl.tensor,
    segment_slot_ptr: tl.tensor,
    num_segments: tl.tensor,
    num_base: tl.tensor,
    first_target: tl.tensor,
    split_blocks: tl.tensor,
    stride_xt: tl.tensor,
    stride_ys: tl.tensor,
    stride_yt: tl.tensor,
    stride_ps: tl.tensor,
    stride_os: tl.tensor,
    IN_FEATURES: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    segment, first_token, last_token = find_tile(
        tl.program_id(0), segment_start_ptr, num_segments, num_base, BLOCK_T
    )
    if first_token >= last_token:
        return
    slot = tl.load(segment_slot_ptr + segment).to(tl.int64)
    span_ptr = row_ptr_ptr + slot * stride_ps + first_target
    first_row = tl.load(span_ptr)
    num_rows = tl.load(span_ptr + NUM_TARGETS) - first_row
    offset_ptr = row_offset_ptr + slot * stride_os + first_row
    token = (first_token + tl.arange(0, BLOCK_T)).to(tl.int64)
    in_segment = (token < last_token)[:, None]
    x_row_ptr = x_ptr + token[:, None] * stride_xt
    y_row_ptr = y_ptr + tl.program_id(2) * stride_ys + (token - num_base)[:, None] * stride_yt
    start = tl.program_id(2) * split_blocks * BLOCK_I
    stop = tl.minimum(start + split_blocks * BLOCK_I, IN_FEATURES)
    for r in range(tl.program_id(1) * BLOCK_R, num_rows, tl.num_programs(1) * BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        in_rows = row < num_rows
        offset = tl.load(offset_ptr + row, mask=in_rows, other=0)
        a_ptr = storage_ptr + tl.multiple_of(offset, 8)[:, None]
        acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for i in range(start, stop, BLOCK_I):
            column = i + tl.arange(0, BLOCK_I)
            in_x = (column < IN_FEATURES)[None, :]
            x = tl.load(x_row_ptr + column[None, :], mask=in_segment & in_x, other=0.0)
            a = tl.load(a_ptr + column[None, :], mask=in_rows[:, None] & in_x, other=0.0)
            acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
        tl.store(y_row_ptr + row[None, :], acc, mask=in_segment & in_rows[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sgmv_expand_kernel(
    out_ptr: tl.tensor,
    y_ptr: tl.tensor,
    storage_ptr: tl.tensor,
    row_ptr_ptr: tl.tensor,
    row_offset_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    segment_start_ptr: tl.tensor,
    segment_slot_ptr: tl.tensor,
    num_segments: tl.tensor,
    num_base: tl.tensor,
    first_target: tl.tensor,
    num_splits: tl.tensor,
    stride_ot: tl.tensor,
    stride_ys: tl.tensor,
    stride_yt: tl.tensor,
    stride_ps: tl.tensor,
    stride_os: tl.tensor,
    ALIGNED_IN: tl.constexpr,
    OUT_START: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    VECTOR: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    segment, first_token, last_token = find_tile(
        tl.program_id(0), segment_start_ptr, num_segments, num_base, BLOCK_T
    )
    if first_token >= last_token:
        return
    target, start, width, block = find_column_block(
        tl.program_id(1), OUT_START, NUM_TARGETS, BLOCK_O
    )
    if VECTOR:
        start = tl.multiple_of(start, 8)
        width = tl.multiple_of(width, 8)
    slot = tl.load(segment_slot_ptr + segment).to(tl.int64)
    span_ptr = row_ptr_ptr + slot * stride_ps + first_target
    span_row = tl.load(span_ptr)
    first_row = tl.load(span_ptr + target)
    last_row = tl.load(span_ptr + target + 1)
    if first_row == last_row:
        return
    token = (first_token + tl.arange(0, BLOCK_T)).to(tl.int64)
    in_segment = (token < last_token)[:, None]
    column = block * BLOCK_O + tl.arange(0, BLOCK_O)
    in_target = (column < width)[None, :]
    split = tl.arange(0, MAX_SPLITS)[:, None, None]
    y_row_ptr = y_ptr + split * stride_ys + (token - num_base)[None, :, None] * stride_yt - span_row

    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for r in range(first_row, last_row, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        in_rows = row < last_row
        in_y = (split < num_splits) & (in_segment & in_rows[None, :])[None, :, :]
        y = tl.sum(tl.load(y_row_ptr + row[None, None, :], mask=in_y, other=0.0), axis=0)
        scale = tl.load(row_scale_ptr + slot * stride_os + row, mask=in_rows, other=0.0)
        y *= scale[None, :]
        offset = tl.load(row_offset_ptr + slot * stride_os + row, mask=in_rows, other=0)
        b_ptr = storage_ptr + tl.multiple_of(offset, 8)[:, None] + ALIGNED_IN + column[None, :]
        b = tl.load(b_ptr, mask=in_rows[:, None] & in_target, other=0.0)  # [BLOCK_R, BLOCK_O]
        high = y.to(b.dtype)
        acc = tl.dot(high, b, acc, input_precision="ieee")
        if b.dtype != tl.float32:  # what the rounding of y to 16 bits left out
            low = (y - high.to(tl.float32)).to(b.dtype)
            acc = tl.dot(low, b, acc, input_precision="ieee")
    out_ptrs = out_ptr + token[:, None] * stride_ot + start + column[None, :]
    total = tl.load(out_ptrs, mask=in_segment & in_target, other=0.0).to(tl.float32) + acc
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=in_segment & in_target)
