"""The Triton attention and rotary kernels, interpreted, against the reference."""

from __future__ import annotations

import importlib

import pytest
import torch

from kernels import reference

SHAPES = [  # heads of q, heads of k and v, head_dim, block_size
    (9, 3, 64, 16),
    (8, 8, 64, 8),
    (32, 8, 128, 16),
]


def check_against_reference(ops, case, rtol=1e-4, atol=1e-5, window=0):
    expected = reference.paged_attention(case.qkv, case.kv_cache, case.index, case.scale, window)
    result = ops.paged_attention(case.qkv, case.kv_cache, case.index, case.scale, window)
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("traffic", "shape"),
    [
        ("decode", SHAPES[0]),
        ("prefill", SHAPES[0]),
        ("chunked", SHAPES[0]),
        ("chunked", SHAPES[1]),
        ("mixed", SHAPES[1]),
        ("mixed", SHAPES[2]),
    ],
    ids=str,
)
def test_paged_attention_equals_the_reference(triton_ops, make_attention_case, traffic, shape):
    num_heads, num_kv_heads, head_dim, block_size = shape
    case = make_attention_case(
        traffic=traffic,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )
    check_against_reference(triton_ops, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_paged_attention_in_16_bits_is_within_a_rounding_of_weights_and_result(
    triton_ops, make_attention_case, dtype
):
    epsilon = torch.finfo(dtype).eps
    case = make_attention_case(dtype=dtype)
    check_against_reference(triton_ops, case, rtol=epsilon, atol=2 * epsilon)


@pytest.mark.parametrize("window", [1, 11, 64])
def test_a_sliding_window_hides_older_keys(triton_ops, make_attention_case, window):
    sequences = ((1, 19), (18, 18), (1, 70), (9, 130), (40, 41))
    case = make_attention_case(sequences=sequences, num_kv_heads=1, num_heads=2)
    check_against_reference(triton_ops, case, window=window)


@pytest.mark.parametrize("window", [0, 70])
def test_splits_of_a_long_context_are_combined(triton_ops, make_attention_case, window):
    sequences = ((1, 700), (1, 3), (1, 257))
    case = make_attention_case(sequences=sequences, num_heads=4, num_kv_heads=2)
    decode = importlib.import_module("kernels.triton.attention_decode")
    assert decode.split_length(700, 6) == 256
    check_against_reference(triton_ops, case, window=window)


def test_huge_scores_do_not_overflow(triton_ops, make_attention_case):
    case = make_attention_case()
    case.qkv.mul_(1e6)  # so far apart that each query takes the value of one key
    check_against_reference(triton_ops, case)


def test_a_padding_sequence_without_context_gets_zeros(triton_ops, make_attention_case):
    case = make_attention_case(traffic="decode")
    case.index.context_len[1] = 0
    check_against_reference(triton_ops, case)
    result = triton_ops.paged_attention(case.qkv, case.kv_cache, case.index, case.scale)
    assert torch.equal(result[1], torch.zeros_like(result[1]))


def test_an_empty_step_gives_an_empty_result(triton_ops, make_attention_case):
    case = make_attention_case(sequences=())
    result = triton_ops.paged_attention(case.qkv, case.kv_cache, case.index, case.scale)
    assert result.shape == (0, 9 * 64)
    triton_ops.rope_store_kv(case.qkv, None, case.positions, case.kv_cache, case.kv_slot)


def test_a_head_dim_that_is_no_power_of_two_is_refused_with_the_remedy(
    triton_ops, make_attention_case
):
    case = make_attention_case(head_dim=80)
    with pytest.raises(ValueError, match=r"head_dim is 80: .* power of two.* on the CPU"):
        triton_ops.paged_attention(case.qkv, case.kv_cache, case.index, case.scale)


@pytest.mark.parametrize(
    ("shape", "rotate", "q_norm", "k_norm"),
    [
        (SHAPES[0], True, False, False),
        (SHAPES[1], True, True, True),
        (SHAPES[2], True, False, False),
        (SHAPES[0], False, False, True),
        (SHAPES[0], False, False, False),
    ],
)
def test_rope_store_kv_equals_the_reference(
    triton_ops, make_attention_case, shape, rotate, q_norm, k_norm
):
    num_heads, num_kv_heads, head_dim, block_size = shape
    arguments = {
        "traffic": "decode",
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "dtype": torch.bfloat16 if rotate else torch.float32,
    }
    generator = torch.Generator().manual_seed(1)
    weights = 0.5 + torch.rand(2, head_dim, generator=generator)
    cases = []
    for ops in (triton_ops, reference):
        case = make_attention_case(**arguments)
        ops.rope_store_kv(
            case.qkv,
            case.cos_sin if rotate else None,
            case.positions,
            case.kv_cache,
            case.kv_slot,
            weights[0].to(case.qkv.dtype) if q_norm else None,
            weights[1].to(case.qkv.dtype) if k_norm else None,
            1e-6,
        )
        cases.append(case)
    result, expected = cases
    rtol = 2**-7 if rotate else 1e-5
    torch.testing.assert_close(result.qkv, expected.qkv, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(
        result.storage, expected.storage, rtol=rtol, atol=1e-6, equal_nan=True
    )


def test_a_cache_that_is_strided_within_a_page_is_refused(triton_ops, make_attention_case):
    case = make_attention_case()
    strided = case.kv_cache.transpose(2, 3)
    with pytest.raises(ValueError, match=r"kv_cache has strides .* contiguous within a page"):
        triton_ops.rope_store_kv(case.qkv, case.cos_sin, case.positions, strided, case.kv_slot)
    with pytest.raises(ValueError, match=r"kv_cache has strides .* contiguous within a page"):
        triton_ops.paged_attention(case.qkv, strided, case.index, case.scale)
