"""BGMV: adapter shrink and expand with a gather per token, for steps of few tokens an adapter."""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import AdapterIndex, RankRows, TargetSpan, aligned
from kernels.triton.launch import MAX_VECTOR, cdiv
from kernels.triton.span import UNSPECIALIZED, find_column_block, num_column_blocks
from kernels.triton.tiles import MAX_SPLITS, Tiling


def bgmv_shrink(
    y: Tensor,
    x: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
    tiling: Tiling,
) -> None:
    """y[s, t, i] = the part of x[num_base + t] · aᵢ that lies in split s of the inputs.

    x [T, I]; y [num_splits, T - num_base, max_span_rows] fp32, of which the entries past a
    slot's rows, and of tokens with slot -1, stay as they are; the sum over s is what
    `kernels.reference.adapter_shrink` returns. (Punica, arXiv:2310.18547, sec. 4)
    """
    num_splits, num_tokens, _ = y.shape
    tile = tiling.shrink
    _bgmv_shrink_kernel[(num_tokens, tiling.row_programs, num_splits)](
        y,
        x,
        storage,
        rows.row_ptr,
        rows.row_offset,
        index.token_slot,
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
        BLOCK_R=tile.rows,
        BLOCK_I=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def bgmv_expand(
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

    out [T, O], in place; y as `bgmv_shrink` leaves it. (Punica, arXiv:2310.18547, sec. 4)
    """
    num_splits, num_tokens, _ = y.shape
    tile = tiling.expand
    _bgmv_expand_kernel[(num_tokens, num_column_blocks(span.out_start, tile.columns))](
        out,
        y,
        storage,
        rows.row_ptr,
        rows.row_offset,
        rows.row_scale,
        index.token_slot,
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
        MAX_SPLITS=MAX_SPLITS["bgmv"],
        BLOCK_R=tile.rows,
        BLOCK_O=tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _bgmv_shrink_kernel(
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    storage_ptr: tl.tensor,
    row_ptr_ptr: tl.tensor,
    row_offset_ptr: tl.tensor,
    token_slot_ptr: tl.tensor,
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
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot_ptr + num_base + token).to(tl.int64)
    if slot < 0:
        return
    span_ptr = row_ptr_ptr + slot * stride_ps + first_target
    first_row = tl.load(span_ptr)
    num_rows = tl.load(span_ptr + NUM_TARGETS) - first_row
    offset_ptr = row_offset_ptr + slot * stride_os + first_row
    x_row_ptr = x_ptr + (num_base + token) * stride_xt
    y_row_ptr = y_ptr + tl.program_id(2) * stride_ys + token * stride_yt
    start = tl.program_id(2) * split_blocks * BLOCK_I
    stop = tl.minimum(start + split_blocks * BLOCK_I, IN_FEATURES)
    for r in range(tl.program_id(1) * BLOCK_R, num_rows, tl.num_programs(1) * BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        in_rows = row < num_rows
        offset = tl.load(offset_ptr + row, mask=in_rows, other=0)
        a_ptr = storage_ptr + tl.multiple_of(offset, 8)[:, None]
        acc = tl.zeros([BLOCK_R, BLOCK_I], dtype=tl.float32)
        for i in range(start, stop, BLOCK_I):
            column = i + tl.arange(0, BLOCK_I)
            in_x = column < IN_FEATURES
            x = tl.load(x_row_ptr + column, mask=in_x, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + column[None, :], mask=in_rows[:, None] & in_x[None, :], other=0.0)
            acc += a.to(tl.float32) * x[None, :]
        tl.store(y_row_ptr + row, tl.sum(acc, axis=1), mask=in_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _bgmv_expand_kernel(
    out_ptr: tl.tensor,
    y_ptr: tl.tensor,
    storage_ptr: tl.tensor,
    row_ptr_ptr: tl.tensor,
    row_offset_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    token_slot_ptr: tl.tensor,
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
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slot_ptr + num_base + token).to(tl.int64)
    if slot < 0:
        return
    target, start, width, block = find_column_block(
        tl.program_id(1), OUT_START, NUM_TARGETS, BLOCK_O
    )
    if VECTOR:
        start = tl.multiple_of(start, 8)
        width = tl.multiple_of(width, 8)
    span_ptr = row_ptr_ptr + slot * stride_ps + first_target
    span_row = tl.load(span_ptr)
    first_row = tl.load(span_ptr + target)
    last_row = tl.load(span_ptr + target + 1)
    if first_row == last_row:
        return
    column = block * BLOCK_O + tl.arange(0, BLOCK_O)
    in_target = column < width
    split = tl.arange(0, MAX_SPLITS)[:, None]
    y_row_ptr = y_ptr + split * stride_ys + token * stride_yt - span_row
    acc = tl.zeros([BLOCK_O], dtype=tl.float32)
    for r in range(first_row, last_row, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        in_rows = row < last_row
        in_y = (split < num_splits) & in_rows[None, :]
        y = tl.sum(tl.load(y_row_ptr + row[None, :], mask=in_y, other=0.0), axis=0)
        y *= tl.load(row_scale_ptr + slot * stride_os + row, mask=in_rows, other=0.0)
        offset = tl.load(row_offset_ptr + slot * stride_os + row, mask=in_rows, other=0)
        b_ptr = storage_ptr + tl.multiple_of(offset, 8)[:, None] + ALIGNED_IN + column[None, :]
        b = tl.load(b_ptr, mask=in_rows[:, None] & in_target[None, :], other=0.0)
        acc += tl.sum(b.to(tl.float32) * y[:, None], axis=0)
    out_row_ptr = out_ptr + (num_base + token) * stride_ot + start + column
    total = tl.load(out_row_ptr, mask=in_target, other=0.0).to(tl.float32) + acc
    tl.store(out_row_ptr, total.to(out_ptr.dtype.element_ty), mask=in_target)
