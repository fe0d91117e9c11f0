"""The reference against dense products, torch's attention and transformers' rotary embedding."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.layout import aligned

ADAPTER_CASES = [
    {"popularity": "distinct"},
    {"popularity": "uniform", "num_base": 0},
    {"popularity": "skewed", "out_widths": (48,)},
    {"popularity": "identical", "out_widths": (40, 40)},
    {"missing_targets": True, "ranks": (1, 6, 17)},
    {"in_features": 20, "out_widths": (12, 4, 4), "strided": True},
    {"num_tokens": 3, "num_base": 3},
    {"num_tokens": 0, "num_base": 0},
]


@pytest.mark.parametrize("arguments", ADAPTER_CASES, ids=str)
def test_add_adapters_equals_dense_products(make_adapter_case, arguments):
    case = make_adapter_case(**arguments)
    expected = case.expected()
    reference.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    torch.testing.assert_close(case.out, expected, rtol=1e-5, atol=1e-5)


def test_add_adapters_leaves_base_rows_bit_identical(make_adapter_case):
    case = make_adapter_case(num_base=5, dtype=torch.bfloat16)
    before = case.out.clone()
    reference.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert torch.equal(case.out[:5], before[:5])
    assert not torch.equal(case.out[5:], before[5:])


def test_add_adapters_rounds_once_in_bf16(make_adapter_case):
    case = make_adapter_case(dtype=torch.bfloat16)
    expected = case.expected()
    reference.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    torch.testing.assert_close(case.out.float(), expected, rtol=2**-8, atol=1e-5)


def test_shrink_columns_are_the_rank_rows_of_the_span_in_order(make_adapter_case):
    case = make_adapter_case(popularity="identical", num_base=1)
    y = reference.adapter_shrink(case.x, case.storage, case.rows, case.index, case.span)
    slot = int(case.index.token_slot[-1])
    a = torch.cat([case.loras[slot, j].a for j in range(3)])
    torch.testing.assert_close(y[1:, : len(a)], case.x[1:] @ a.T, rtol=1e-5, atol=1e-5)


def test_b_begins_at_the_aligned_end_of_a(make_adapter_case):
    case = make_adapter_case(popularity="identical", in_features=20, out_widths=(12,), ranks=(1,))
    slot = int(case.index.token_slot[-1])
    row = int(case.rows.row_ptr[slot, case.span.first])
    start = int(case.rows.row_offset[slot, row]) + aligned(20)
    packed = case.storage.view(-1)[start : start + 12]
    assert torch.equal(packed, case.loras[slot, 0].b[:, 0])


@pytest.mark.parametrize("traffic", ["decode", "prefill", "chunked", "mixed"])
@pytest.mark.parametrize("heads", [(9, 3), (8, 8), (32, 8)], ids=str)
def test_paged_attention_equals_torch_on_the_contiguous_sequence(
    make_attention_case, traffic, heads
):
    case = make_attention_case(
        traffic=traffic, num_heads=heads[0], num_kv_heads=heads[1], block_size=8
    )
    out = reference.paged_attention(case.qkv, case.kv_cache, case.index, case.scale)
    torch.testing.assert_close(out, torch_attention(case, *heads), rtol=1e-4, atol=1e-5)


def test_paged_attention_window_equals_a_banded_mask(make_attention_case):
    case = make_attention_case(head_dim=128)
    out = reference.paged_attention(case.qkv, case.kv_cache, case.index, case.scale, window=11)
    torch.testing.assert_close(out, torch_attention(case, 9, 3, window=11), rtol=1e-4, atol=1e-5)


def torch_attention(case, num_heads, num_kv_heads, window=0):
    """scaled_dot_product_attention over each sequence's keys, gathered token by token."""
    _, _, block_size, _, head_dim = case.kv_cache.shape
    outputs = []
    for s, length in enumerate(case.index.context_len.tolist()):
        start, stop = case.index.query_start[s : s + 2].tolist()
        places = [divmod(i, block_size) for i in range(length)]
        table = case.index.block_table[s].tolist()
        k, v = (
            torch.stack([case.kv_cache[table[block], part, at] for block, at in places], dim=1)
            for part in (0, 1)
        )
        q = case.qkv[start:stop, : num_heads * head_dim].view(-1, num_heads, head_dim)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if window:
            mask &= mask.new_ones(length, length).triu(1 - window)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1),
                k,
                v,
                attn_mask=mask[length - (stop - start) :],
                scale=case.scale,
                enable_gqa=True,
            ).transpose(0, 1)
        )
    return torch.cat(outputs).flatten(1)


def test_rope_equals_the_rotary_embedding_of_transformers(make_attention_case):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    case = make_attention_case()
    cos, sin = case.cos_sin[case.positions.long()].chunk(2, dim=-1)
    heads = case.qkv.clone().view(len(case.qkv), -1, 64)
    q, k = apply_rotary_pos_emb(
        heads[None, :, :9].transpose(1, 2),
        heads[None, :, 9:12].transpose(1, 2),
        torch.cat([cos, cos], dim=-1)[None],
        torch.cat([sin, sin], dim=-1)[None],
    )
    reference.rope_store_kv(case.qkv, case.cos_sin, case.positions, case.kv_cache, case.kv_slot)
    result = case.qkv.view(len(case.qkv), -1, 64)
    torch.testing.assert_close(result[:, :9], q[0].transpose(0, 1))
    torch.testing.assert_close(result[:, 9:12], k[0].transpose(0, 1))
    assert torch.equal(result[:, 12:], heads[:, 12:])


def test_rope_stores_k_and_v_where_kv_slot_says_and_nowhere_else(make_attention_case):
    case = make_attention_case()
    before = case.storage.clone().view(-1, 3, 2, 16, 3, 64)
    reference.rope_store_kv(case.qkv, case.cos_sin, case.positions, case.kv_cache, case.kv_slot)
    heads = case.qkv.view(len(case.qkv), -1, 64)
    expected = before.clone()
    for t, slot in enumerate(case.kv_slot.tolist()):
        expected[slot // 16, 1, 0, slot % 16] = heads[t, 9:12]
        expected[slot // 16, 1, 1, slot % 16] = heads[t, 12:]
    result = case.storage.view_as(expected)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_head_norm_is_the_rms_norm_of_each_head_before_the_rotation(make_attention_case):
    case = make_attention_case()
    q_norm, k_norm = torch.rand(64) + 0.5, torch.rand(64) + 0.5
    heads = case.qkv.clone().view(len(case.qkv), -1, 64)
    reference.rope_store_kv(
        case.qkv, None, case.positions, case.kv_cache, case.kv_slot, q_norm, k_norm, 1e-6
    )
    result = case.qkv.view(len(case.qkv), -1, 64)
    expected_q = torch.nn.functional.rms_norm(heads[:, :9], (64,), q_norm, 1e-6)
    expected_k = torch.nn.functional.rms_norm(heads[:, 9:12], (64,), k_norm, 1e-6)
    torch.testing.assert_close(result[:, :9], expected_q)
    torch.testing.assert_close(result[:, 9:12], expected_k)


def test_norm_and_activation_equal_torch():
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, 48, generator=generator)
    weight = torch.rand(48, generator=generator)
    expected = torch.nn.functional.rms_norm(x + residual, (48,), weight, 1e-5)
    torch.testing.assert_close(reference.add_rms_norm(x, residual, weight, 1e-5), expected)
    torch.testing.assert_close(reference.rms_norm(residual, weight, 1e-5), expected)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(reference.silu_mul(x), torch.nn.functional.silu(gate) * up)
