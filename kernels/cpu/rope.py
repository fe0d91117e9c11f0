"""Rotary embedding of q and k (after their norms, where a model has them), and the KV write."""

from __future__ import annotations

from numba import prange

from kernels.cpu.norm import normalise
from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    elements,
    f32,
    fma,
    i32,
    i64,
    load,
    load_part,
    mul,
    store,
    store_part,
    sub,
    zero,
)


@part
def _rotate(head, at, cos_sin, angle_at, half_dim):
    """(x1, x2) = (x1 cos - x2 sin, x2 cos + x1 sin) over the two halves of one head."""
    for i in range(0, half_dim, 16):
        n = min(16, half_dim - i)
        first, second = load_part(head, at + i, n), load_part(head, at + half_dim + i, n)
        cos = load_part(cos_sin, angle_at + i, n)
        sin = load_part(cos_sin, angle_at + half_dim + i, n)
        turned = fma(second, sub(zero(), sin), mul(first, cos))
        store_part(head, at + half_dim + i, fma(first, sin, mul(second, cos)), n)
        store_part(head, at + i, turned, n)


@part
def _copy(target, target_at, source, at, count):
    full, rest = count // 16 * 16, count % 16
    for i in range(0, full, 16):
        store(target, target_at + i, load(source, at + i))
    if rest:
        store_part(target, target_at + full, load_part(source, at + full, rest), rest)


@part
def _token(qkv, at, num_heads, num_kv_heads, dim, q_norm, k_norm, normed, eps, cos_sin, angle_at):
    for h in range(num_heads + num_kv_heads):
        head_at = at + h * dim
        if normed:
            normalise(qkv, head_at, qkv, head_at, q_norm if h < num_heads else k_norm, dim, eps)
        if angle_at >= 0:
            _rotate(qkv, head_at, cos_sin, angle_at, dim // 2)


@kernel
def rope_store_kv(
    kind,
    qkv,
    num_tokens,
    num_heads,
    num_kv_heads,
    dim,
    q_norm,
    k_norm,
    eps,
    cos_sin,
    positions,
    kv,
    page_stride,
    block_size,
    kv_slot,
):
    """Addresses as in `kernels.reference.rope_store_kv`; 0 for an absent cos_sin or norm."""
    width = num_kv_heads * dim
    row = num_heads * dim + 2 * width
    for t in prange(num_tokens):
        angle_at = i32(positions)[t] * dim if cos_sin != 0 else -1
        slot = i64(kv_slot)[t]
        k_at = slot // block_size * page_stride + slot % block_size * width
        v_at = k_at + block_size * width
        at = t * row
        q, n1, n2 = elements(qkv, kind), elements(q_norm, kind), elements(k_norm, kind)
        _token(
            q, at, num_heads, num_kv_heads, dim, n1, n2, q_norm != 0, eps, f32(cos_sin), angle_at
        )
        kv_at = at + num_heads * dim
        _copy(elements(kv, kind), k_at, q, kv_at, width)
        _copy(elements(kv, kind), v_at, q, kv_at + width, width)
