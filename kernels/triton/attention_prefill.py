"""Prefill attention: tiles of queries, causal over the context that is already in the pages."""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import AttentionIndex
from kernels.triton.attention_tile import LOG2_E, UNSPECIALIZED, attend
from kernels.triton.launch import cdiv

TILE_ROWS = 64  # queries x heads that share a KV head
NARROW_TILE = 16  # of fp32, whose products no tensor core makes: the tile lives in registers
MAX_BLOCK_KEYS = 64
KEY_BYTES = 8192  # of a block of keys: more spills registers on sm_80 at head_dim 128


def prefill_attention(
    out: Tensor,
    qkv: Tensor,
    kv_cache: Tensor,
    index: AttentionIndex,
    scale: float,
    window: int,
) -> None:
    """Fill the rows of `out` [T, H * D] that belong to index.prefill; one launch."""
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    group = out.shape[1] // head_dim // num_kv_heads
    rows = TILE_ROWS if qkv.itemsize == 2 else NARROW_TILE
    grid = (cdiv(index.max_query * group, rows), num_kv_heads, len(index.prefill))
    _prefill_attention_kernel[grid](
        out,
        qkv,
        kv_cache,
        index.query_start,
        index.context_len,
        index.block_table,
        index.prefill,
        scale * LOG2_E,
        window,
        qkv.stride(0),
        kv_cache.stride(0),
        index.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOWED=window > 0,
        BLOCK_M=rows,
        BLOCK_N=block_keys(head_dim, qkv.itemsize),
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=2,
    )


def block_keys(head_dim: int, itemsize: int) -> int:
    """Keys of one round of the online softmax."""
    return max(min(KEY_BYTES // (itemsize * head_dim), MAX_BLOCK_KEYS), 16)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prefill_attention_kernel(
    out_ptr: tl.tensor,
    qkv_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    context_len_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    prefill_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
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
    sequence = tl.load(prefill_ptr + tl.program_id(2)).to(tl.int64)
    kv_head = tl.program_id(1)
    first_token = tl.load(query_start_ptr + sequence)
    num_queries = tl.load(query_start_ptr + sequence + 1) - first_token
    context = tl.load(context_len_ptr + sequence)
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= num_queries * GROUP:
        return
    # A row is one query of one of the heads that share kv_head: head varies fastest.
    row = first_row + tl.arange(0, BLOCK_M)
    column = tl.arange(0, HEAD_DIM)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    in_queries = (query < num_queries)[:, None]
    token = (first_token + query).to(tl.int64)
    q_ptrs = qkv_ptr + token[:, None] * stride_qt + head[:, None] * HEAD_DIM + column[None, :]
    q = tl.load(q_ptrs, mask=in_queries, other=0.0)
    position = context - num_queries + query
    last_query = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_queries - 1)
    first_key = 0
    if WINDOWED:
        first_key = tl.maximum(context - num_queries + first_row // GROUP - window + 1, 0)
    acc, _, row_sum = attend(
        q,
        position,
        first_key,
        context - num_queries + last_query + 1,
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
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    place = token * (NUM_KV_HEADS * GROUP) + head
    out_ptrs = out_ptr + place[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_queries)
