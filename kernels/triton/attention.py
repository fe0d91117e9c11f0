"""Paged attention: the sequences of a step that decode, and those that prefill."""

import torch
from torch import Tensor

from kernels.layout import AttentionIndex
from kernels.triton.attention_decode import decode_attention
from kernels.triton.attention_prefill import prefill_attention
from kernels.triton.launch import check_dtypes, check_rows


def paged_attention(
    qkv: Tensor, kv_cache: Tensor, index: AttentionIndex, scale: float, window: int = 0
) -> Tensor:
    """softmax(scale · q kᵀ) v, causal, over each sequence's KV pages; sums and softmax in fp32.

    qkv [T, (H + 2K) * D], rows contiguous; kv_cache [num_pages, 2, block_size, K, D], contiguous
    within a page, head_dim a power of two; returns [T, H * D]. At most one launch for prefill
    and two for decode. Raises ValueError on another layout, dtype or device.
    (PagedAttention, arXiv:2309.06180; FlashAttention-2, arXiv:2307.08691)
    """
    check_rows(qkv=qkv)
    check_dtypes(qkv=qkv, kv_cache=kv_cache)
    if not kv_cache[:1].is_contiguous():
        raise ValueError(
            f"kv_cache has strides {kv_cache.stride()}: it must be contiguous within a page"
        )
    num_kv_heads, head_dim = kv_cache.shape[3:]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(
            f"head_dim is {head_dim}: the GPU kernels take a power of two from 16; "
            "serve this model on the CPU"
        )
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    shape = (qkv.shape[0], num_heads * head_dim)
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    if len(index.decode) > 0:
        decode_attention(out, qkv, kv_cache, index, scale, window)
    if len(index.prefill) > 0:
        prefill_attention(out, qkv, kv_cache, index, scale, window)
    return out
