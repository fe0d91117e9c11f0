"""Decode attention: one query a sequence, split over the context, and the splits combined."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import AttentionIndex
from kernels.triton.attention_tile import LOG2_E, UNSPECIALIZED, attend
from kernels.triton.launch import cdiv, next_power_of_2

TILE_ROWS = 16  # query heads of a tile: the least that a tensor core takes
BLOCK_KEYS = 64
SPLIT_PROGRAMS = 512  # programs wanted of a launch
MIN_SPLIT_KEYS = 256


def split_length(max_context: int, num_programs: int) -> int:
    """Keys of one split, so that num_programs times the splits come to about SPLIT_PROGRAMS."""
    num_splits = max(SPLIT_PROGRAMS // max(num_programs, 1), 1)
    keys = max(cdiv(max_context, num_splits), MIN_SPLIT_KEYS)
    return cdiv(keys, BLOCK_KEYS) * BLOCK_KEYS


def decode_attention(
    out: Tensor,
    qkv: Tensor,
    kv_cache: Tensor,
    index: AttentionIndex,
    scale: float,
    window: int,
) -> None:
    """Fill the rows of `out` [T, H * D] that belong to index.decode; two launches."""
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_heads, num_sequences = out.shape[1] // head_dim, len(index.decode)
    group = num_heads // num_kv_heads
    rows = max(next_power_of_2(group), TILE_ROWS)
    split_keys = split_length(index.max_context, num_sequences * num_kv_heads)
    num_splits = cdiv(index.max_context, split_keys)
    # For each (sequence, split, head): the weighted sum of v, and the log2 of the weights' sum.
    partial = torch.empty(
        (num_sequences, num_splits, num_heads, head_dim), dtype=torch.float32, device=out.device
    )
    partial_lse = torch.empty(
        (num_sequences, num_splits, num_heads), dtype=torch.float32, device=out.device
    )
    _decode_attention_kernel[(num_sequences, num_kv_heads, num_splits)](
        partial,
        partial_lse,
        qkv,
        kv_cache,
        index.query_start,
        index.context_len,
        index.block_table,
        index.decode,
        scale * LOG2_E,
        window,
        split_keys,
        num_splits,
        qkv.stride(0),
        kv_cache.stride(0),
        index.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOWED=window > 0,
        BLOCK_M=rows,
        BLOCK_N=BLOCK_KEYS,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=2,
    )
    _combine_splits_kernel[(num_sequences, num_heads)](
        out,
        partial,
        partial_lse,
        index.query_start,
        index.context_len,
        index.decode,
        split_keys,
        num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        num_warps=1,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _decode_attention_kernel(
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    qkv_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    context_len_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    decode_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    split_keys: tl.tensor,
    num_splits: tl.tensor,
    stride_qt: tl.tensor,
    stride_page: tl.tensor,
    stride_bs: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    sequence = tl.load(decode_ptr + tl.program_id(0)).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_len_ptr + sequence)
    first_key = split * split_keys
    if first_key >= context:
        return
    last_key = tl.minimum(first_key + split_keys, context)
    if WINDOWED:  # a split that lies before the window runs no tile and weighs nothing
        first_key = tl.maximum(first_key, context - window)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, HEAD_DIM)
    in_group = row < GROUP
    head = kv_head * GROUP + row
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    q_ptrs = qkv_ptr + token * stride_qt + head[:, None] * HEAD_DIM + column[None, :]
    q = tl.load(q_ptrs, mask=in_group[:, None], other=0.0)
    position = tl.zeros([BLOCK_M], dtype=tl.int32) + (context - 1)
    acc, row_max, row_sum = attend(
        q,
        position,
        first_key,
        last_key,
        kv_ptr + kv_head * HEAD_DIM,
        block_table_ptr + sequence * stride_bs,
        scale,
        window,
        stride_page,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        WINDOWED,
        BLOCK_M,
        BLOCK_N,
    )
    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    lse = tl.where(empty, -float("inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
    place = (tl.program_id(0).to(tl.int64) * num_splits + split) * NUM_KV_HEADS * GROUP + head
    tl.store(partial_ptr + place[:, None] * HEAD_DIM + column[None, :], acc, mask=in_group[:, None])
    tl.store(partial_lse_ptr + place, lse, mask=in_group)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _combine_splits_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    context_len_ptr: tl.tensor,
    decode_ptr: tl.tensor,
    split_keys: tl.tensor,
    num_splits: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    sequence = tl.load(decode_ptr + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, HEAD_DIM)
    context = tl.load(context_len_ptr + sequence)
    place = tl.program_id(0).to(tl.int64) * num_splits * NUM_HEADS + head
    acc = tl.zeros([HEAD_DIM], dtype=tl.float32)
    top = -float("inf")
    total = 0.0
    for split in range((context + split_keys - 1) // split_keys):
        at = place + split * NUM_HEADS
        lse = tl.load(partial_lse_ptr + at)
        new_top = tl.maximum(top, lse)
        if new_top > -float("inf"):  # the first splits may lie before the window
            keep = tl.exp2(top - new_top)
            weight = tl.exp2(lse - new_top)
            acc = acc * keep + tl.load(partial_ptr + at * HEAD_DIM + column) * weight
            total = total * keep + weight
            top = new_top
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    out_row_ptr = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM
    result = acc / tl.where(total == 0.0, 1.0, total)  # a padding sequence has no context: 0
    tl.store(out_row_ptr + column, result.to(out_ptr.dtype.element_ty))
