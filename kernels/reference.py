"""Every operation in plain torch: the specification, and the oracle of the tests.

Slow on purpose: it follows the formulae, one token and one sequence at a time.
All arithmetic is fp32; results are rounded once, when they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import AdapterIndex, AttentionIndex, RankRows, TargetSpan, aligned


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis.

    x [T, H]; weight [H]; returns [T, H] in x's dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place and rounded to its dtype; returns rms_norm(residual).

    x, residual [T, H]; weight [H]; returns [T, H].
    """
    residual.copy_((residual.float() + x.float()).to(residual.dtype))
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up.

    gate_up [T, 2I], gate first; returns [T, I] in the same dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


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
    """Norm (where weights are given) and rotate q and k in place, and store k and v in their pages.

    qkv [T, (H + 2K) * D], heads of q, then k, then v. q_norm, k_norm [D]: RMSNorm over each head,
    before the rotation (Qwen 3). cos_sin [max_positions, D] fp32, cos of the D/2 frequencies, then
    sin; the halves of a head are rotated against each other (x1 cos - x2 sin, x2 cos + x1 sin);
    None leaves q and k unrotated (layers without position). positions [T] int32.
    kv_cache [num_pages, 2, block_size, K, D], strided over pages, k at index 0, v at 1.
    kv_slot [T] int64: page * block_size + offset of each token.
    """
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    for part, norm in ((slice(0, num_heads), q_norm), (slice(num_heads, -num_kv_heads), k_norm)):
        wide = heads[:, part].float()
        if norm is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm.float()
        if cos_sin is not None:
            cos, sin = cos_sin[positions.long()].chunk(2, dim=-1)
            cos, sin = cos[:, None], sin[:, None]
            first, second = wide.chunk(2, dim=-1)
            wide = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        heads[:, part] = wide.to(qkv.dtype)
    page, offset = kv_slot // block_size, kv_slot % block_size
    kv_cache[page, 0, offset] = heads[:, num_heads : num_heads + num_kv_heads]
    kv_cache[page, 1, offset] = heads[:, num_heads + num_kv_heads :]


def paged_attention(
    qkv: Tensor, kv_cache: Tensor, index: AttentionIndex, scale: float, window: int = 0
) -> Tensor:
    """softmax(scale · q kᵀ) v, causal, over each sequence's KV pages, heads of q grouped over K.

    qkv [T, (H + 2K) * D], of which the first H heads are read; kv_cache as in `rope_store_kv`,
    which has stored this step's tokens already. The last query of a sequence sees all
    context_len tokens, the one before it one fewer. window > 0: a query sees only the last
    `window` tokens, itself included. Returns [T, H * D].  (PagedAttention, arXiv:2309.06180)
    """
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q_all = qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
    out = torch.full((qkv.shape[0], num_heads, head_dim), torch.nan, dtype=qkv.dtype)
    out = out.to(qkv.device)
    for s, length in enumerate(index.context_len.tolist()):
        start, stop = index.query_start[s].item(), index.query_start[s + 1].item()
        pages = index.block_table[s, : -(-length // block_size)].long()
        kv = kv_cache[pages].transpose(0, 1).reshape(2, -1, num_kv_heads, head_dim)[:, :length]
        k, v = kv.float().repeat_interleave(num_heads // num_kv_heads, dim=2)
        scores = torch.einsum("qhd,khd->hqk", q_all[start:stop].float(), k) * scale
        key = torch.arange(length, device=qkv.device)
        query = torch.arange(length - (stop - start), length, device=qkv.device)[:, None]
        hidden = key > query
        if window > 0:
            hidden |= key <= query - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, v).to(qkv.dtype)
    return out.view(qkv.shape[0], -1)


def adapter_shrink(
    x: Tensor, storage: Tensor, rows: RankRows, index: AdapterIndex, span: TargetSpan
) -> Tensor:
    """y[t, i] = x[t] · aᵢ for the rank rows i that token t's slot has in the span.

    x [T, I]; storage [num_pages, page_elements], the pages that rows point into; returns
    [T, max_span_rows] fp32; entries past a slot's rows, and base tokens, are unspecified.
    (Punica, arXiv:2310.18547, sec. 4: the first half of BGMV and SGMV)
    """
    flat, in_features = storage.view(-1), x.shape[1]
    y = torch.full((x.shape[0], index.max_span_rows), torch.nan, device=x.device)
    for t, slot in enumerate(index.token_slot.tolist()):
        if slot < 0:
            continue
        first, last = rows.row_ptr[slot, [span.first, span.first + len(span.out_start) - 1]]
        for i, row in enumerate(range(int(first), int(last))):
            offset = int(rows.row_offset[slot, row])
            y[t, i] = x[t].float() @ flat[offset : offset + in_features].float()
    return y


def adapter_expand(
    out: Tensor,
    y: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
    in_features: int,
) -> None:
    """out[t, target's columns] += Σᵢ scaleᵢ · y[t, i] · bᵢ, summed in fp32, rounded once.

    out [T, O], in place; y as `adapter_shrink` returns it; base tokens stay as they are.
    (Punica, arXiv:2310.18547, sec. 4: the second half of BGMV and SGMV)
    """
    flat, num_span_targets = storage.view(-1), len(span.out_start) - 1
    for t, slot in enumerate(index.token_slot.tolist()):
        if slot < 0:
            continue
        ptr = rows.row_ptr[slot, span.first : span.first + num_span_targets + 1].tolist()
        for j in range(num_span_targets):
            columns = slice(span.out_start[j], span.out_start[j + 1])
            width = columns.stop - columns.start
            total = out[t, columns].float()
            for row in range(ptr[j], ptr[j + 1]):
                offset = int(rows.row_offset[slot, row]) + aligned(in_features)
                b = flat[offset : offset + width].float()
                total = total + rows.row_scale[slot, row] * y[t, row - ptr[0]] * b
            out[t, columns] = total.to(out.dtype)


def add_adapters(
    out: Tensor,
    x: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
) -> None:
    """out[t] += ΔW[slot[t]] x[t] for every token with a slot; base tokens stay as they are.

    x [T, I] and out [T, O], rows contiguous; the rest as in `adapter_shrink` and `adapter_expand`.
    """
    y = adapter_shrink(x, storage, rows, index, span)
    adapter_expand(out, y, storage, rows, index, span, x.shape[1])
