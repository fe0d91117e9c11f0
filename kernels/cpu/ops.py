"""The operations of `kernels.reference` for tensors on the CPU, in fp32 or bf16."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from kernels.cpu import activation, adapters, attention, decode, norm, prefill, rope
from kernels.cpu.runtime import has_features, workers
from kernels.layout import AdapterIndex, AttentionIndex, RankRows, TargetSpan

CACHE_LINE = 64

KINDS: dict[torch.dtype, np.generic] = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
}
"""The argument of `kernels.cpu.simd.elements` for each type that is served."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`."""
    kind = _kind(x, weight)
    out = torch.empty_like(x)
    norm.rms_norm(kind, out.data_ptr(), x.data_ptr(), weight.data_ptr(), *x.shape, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.add_rms_norm`."""
    kind = _kind(x, residual, weight)
    out = torch.empty_like(x)
    norm.add_rms_norm(
        kind,
        out.data_ptr(),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        *x.shape,
        eps,
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.reference.silu_mul`."""
    kind = _kind(gate_up)
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    activation.silu_mul(kind, out.data_ptr(), gate_up.data_ptr(), num_tokens, width)
    return out


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
    """See `kernels.reference.rope_store_kv`."""
    kind = _kind(qkv)
    page_stride, block_size, num_kv_heads, head_dim = _kv_shape(kv_cache, qkv)
    rope.rope_store_kv(
        kind,
        qkv.data_ptr(),
        qkv.shape[0],
        qkv.shape[1] // head_dim - 2 * num_kv_heads,
        num_kv_heads,
        head_dim,
        _address(q_norm),
        _address(k_norm),
        eps,
        _address(cos_sin),
        positions.data_ptr(),
        kv_cache.data_ptr(),
        page_stride,
        block_size,
        kv_slot.data_ptr(),
    )


def paged_attention(
    qkv: Tensor, kv_cache: Tensor, index: AttentionIndex, scale: float, window: int = 0
) -> Tensor:
    """See `kernels.reference.paged_attention`."""
    kind = _kind(qkv)
    page_stride, block_size, num_kv_heads, head_dim = _kv_shape(kv_cache, qkv)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    out = qkv.new_empty(qkv.shape[0], num_heads * head_dim)
    num_workers = workers()
    where = (
        kind, out.data_ptr(), qkv.data_ptr(), qkv.shape[1], num_heads, num_kv_heads, head_dim,
        kv_cache.data_ptr(), page_stride, block_size,
    )  # fmt: skip
    steps = (
        index.query_start.data_ptr(), index.context_len.data_ptr(), index.block_table.data_ptr(),
        index.block_table.shape[1], scale, window,
    )  # fmt: skip
    has_pairs = qkv.dtype == torch.bfloat16 and has_features("avx512bf16")
    if has_pairs and prefill.can_attend(head_dim):
        group = num_heads // num_kv_heads
        if num_sequences := len(index.prefill):
            size = prefill.scratch_bytes_for(group, head_dim)
            # Few queries: smaller tiles, so that every worker has some.
            num_queries = qkv.shape[0] - len(index.decode)
            each = min(max(-(-num_queries // num_workers), 8), prefill.QUERIES)
            scratch, address = _lines(num_workers * size)
            prefill.prefill(
                *where, index.prefill.data_ptr(), num_sequences, *steps, address, size, each,
                num_workers,
            )  # fmt: skip
        if num_sequences := len(index.decode):
            size = decode.scratch_bytes_for(num_heads, head_dim)
            scratch, address = _lines(num_workers * size)
            decode.decode(
                *where, index.decode.data_ptr(), num_sequences, *steps, address, size,
                num_workers,
            )  # fmt: skip
        return out
    elements = attention.scratch_elements(num_heads, num_kv_heads, head_dim)
    scratch = torch.empty(num_workers, elements)
    for function, sequences in (
        (attention.decode, index.decode),
        (attention.prefill, index.prefill),
    ):
        if len(sequences):
            function(
                *where, sequences.data_ptr(), len(sequences), *steps, scratch.data_ptr(), elements,
                num_workers,
            )  # fmt: skip
    return out


def add_adapters(
    out: Tensor,
    x: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
) -> None:
    """See `kernels.reference.add_adapters`."""
    if not index.max_segment or not index.max_span_rows:
        return
    _check_rows(out, x, storage, span)
    out_start = _out_start(span)
    num_workers = workers()
    # Not made in the kernel: numba frees an array after its last use by name, whoever still has
    # its address.
    scratch = torch.empty(num_workers, adapters.scratch_elements(index.max_span_rows))
    adapters.add_adapters(
        KINDS[storage.dtype],
        out.data_ptr(),
        out.stride(0),
        x.data_ptr(),
        x.stride(0),
        x.shape[1],
        storage.data_ptr(),
        index.segment_start.data_ptr(),
        index.segment_slot.data_ptr(),
        len(index.segment_slot),
        rows.row_ptr.data_ptr(),
        rows.row_ptr.shape[1],
        span.first,
        rows.row_offset.data_ptr(),
        rows.row_scale.data_ptr(),
        rows.row_offset.shape[1],
        out_start.data_ptr(),
        len(span.out_start) - 1,
        index.max_span_rows,
        scratch.data_ptr(),
        scratch.shape[1],
        num_workers,
    )


def _lines(num_bytes: int) -> tuple[Tensor, int]:
    """Scratch, and an address in it that begins a cache line."""
    scratch = torch.empty(num_bytes + CACHE_LINE, dtype=torch.uint8)
    return scratch, -(-scratch.data_ptr() // CACHE_LINE) * CACHE_LINE


@functools.lru_cache
def _out_start(span: TargetSpan) -> Tensor:
    return torch.tensor(span.out_start, dtype=torch.int32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kind(*tensors: Tensor) -> np.generic:
    """What tells the kernels the tensors' type; ValueError unless it is one, and all contiguous."""
    dtype = tensors[0].dtype
    if dtype not in KINDS:
        raise ValueError(f"the CPU kernels take bfloat16 or float32, not {dtype}")
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise ValueError(f"tensors of one call have one dtype: {dtype} and {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    return KINDS[dtype]


def _kv_shape(kv_cache: Tensor, qkv: Tensor) -> tuple[int, int, int, int]:
    """Page stride, block size, KV heads and head size of one layer's cache."""
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    inner = (block_size * num_kv_heads * head_dim, num_kv_heads * head_dim, head_dim, 1)
    if kv_cache.stride()[1:] != inner or kv_cache.dtype != qkv.dtype:
        raise ValueError(
            f"kv_cache is {kv_cache.dtype} with strides {kv_cache.stride()}; it must have qkv's "
            f"dtype {qkv.dtype} and be strided over pages only, strides (any, {inner})"
        )
    return kv_cache.stride(0), block_size, num_kv_heads, head_dim


def _check_rows(out: Tensor, x: Tensor, storage: Tensor, span: TargetSpan) -> None:
    if not (out.dtype == x.dtype == storage.dtype) or out.dtype not in KINDS:
        raise ValueError(
            f"out {out.dtype}, x {x.dtype} and pages {storage.dtype} must all be bfloat16 or "
            "all float32"
        )
    if out.stride(1) != 1 or x.stride(1) != 1:
        raise ValueError("the rows of out and x must be contiguous")
    if out.shape != (x.shape[0], span.out_start[-1]):
        raise ValueError(
            f"out is {tuple(out.shape)}; {x.shape[0]} tokens and {span.out_start[-1]} columns "
            "are needed"
        )
