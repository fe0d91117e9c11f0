"""Head norm and rotation of q and k in place, and the write of k and v to their pages."""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import cdiv, check_dtypes, check_rows, next_power_of_2

BLOCK_HEADS = 8


def rope_store_kv(
    qkv: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    kv_cache: Tensor,
    kv_slot: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm (where weights are given) and rotate q and k in place, and store k and v; one launch.

    qkv [T, (H + 2K) * D], rows contiguous; cos_sin [max_positions, D] fp32, contiguous, or None
    for no rotation; positions [T] int32; kv_cache [num_pages, 2, block_size, K, D], strided over
    pages only; kv_slot [T] int64: page * block_size + offset; q_norm, k_norm [D] or None.
    Raises ValueError on another layout and on dtypes of qkv and kv_cache that differ.
    """
    check_rows(qkv=qkv)
    check_dtypes(qkv=qkv, kv_cache=kv_cache)
    if not kv_cache[:1].is_contiguous():
        raise ValueError(
            f"kv_cache has strides {kv_cache.stride()}: it must be contiguous within a page"
        )
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_tokens, num_all_heads = qkv.shape[0], qkv.shape[1] // head_dim
    if num_tokens == 0:
        return
    block = next_power_of_2(head_dim // 2)
    _rope_store_kv_kernel[(num_tokens, cdiv(num_all_heads, BLOCK_HEADS))](
        qkv,
        positions if cos_sin is None else cos_sin,
        positions,
        kv_cache,
        kv_slot,
        kv_slot if q_norm is None else q_norm,
        kv_slot if k_norm is None else k_norm,
        eps,
        qkv.stride(0),
        kv_cache.stride(0),
        NUM_HEADS=num_all_heads - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_H=BLOCK_HEADS,
        BLOCK_D=block,
        ROTATE=cos_sin is not None,
        Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None,
        num_warps=max(BLOCK_HEADS * block // 256, 1),
        enable_fp_fusion=True,
    )


@triton.jit
def _rope_store_kv_kernel(
    qkv_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    kv_slot_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    eps: tl.tensor,
    stride_qt: tl.tensor,
    stride_page: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
) -> None:
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    in_half = column < HALF
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    is_q = (head < NUM_HEADS)[:, None]
    is_k = (head < NUM_HEADS + NUM_KV_HEADS)[:, None] & (head >= NUM_HEADS)[:, None]

    first_ptr = qkv_ptr + token * stride_qt + head[:, None] * HEAD_DIM + column[None, :]
    first = tl.load(first_ptr, mask=mask, other=0.0)  # [BLOCK_H, BLOCK_D]
    second = tl.load(first_ptr + HALF, mask=mask, other=0.0)
    x1 = first.to(tl.float32)
    x2 = second.to(tl.float32)
    if Q_NORM or K_NORM:
        square = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        inverse = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        if Q_NORM:
            w1 = tl.load(q_norm_ptr + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
            w2 = tl.load(q_norm_ptr + HALF + column, mask=in_half, other=0.0).to(tl.float32)
            x1 = tl.where(is_q, x1 * inverse * w1, x1)
            x2 = tl.where(is_q, x2 * inverse * w2[None, :], x2)
        if K_NORM:
            w1 = tl.load(k_norm_ptr + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
            w2 = tl.load(k_norm_ptr + HALF + column, mask=in_half, other=0.0).to(tl.float32)
            x1 = tl.where(is_k, x1 * inverse * w1, x1)
            x2 = tl.where(is_k, x2 * inverse * w2[None, :], x2)
    if ROTATE:
        row_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM
        cos = tl.load(row_ptr + column, mask=in_half, other=0.0)[None, :]
        sin = tl.load(row_ptr + HALF + column, mask=in_half, other=0.0)[None, :]
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    else:
        y1 = x1
        y2 = x2
    rotated = is_q | is_k  # heads of v pass through with their bits unchanged
    first = tl.where(rotated, y1.to(first.dtype), first)
    second = tl.where(rotated, y2.to(second.dtype), second)
    tl.store(first_ptr, first, mask=mask & rotated)
    tl.store(first_ptr + HALF, second, mask=mask & rotated)

    slot = tl.load(kv_slot_ptr + token)
    page_ptr = kv_ptr + slot // BLOCK_SIZE * stride_page
    kv_head = head - NUM_HEADS
    part = kv_head // NUM_KV_HEADS  # 0 = k, 1 = v
    row = (part * BLOCK_SIZE + slot % BLOCK_SIZE) * NUM_KV_HEADS + kv_head % NUM_KV_HEADS
    kv_row_ptr = page_ptr + row[:, None] * HEAD_DIM + column[None, :]
    store = mask & (kv_head >= 0)[:, None]
    tl.store(kv_row_ptr, first, mask=store)
    tl.store(kv_row_ptr + HALF, second, mask=store)
