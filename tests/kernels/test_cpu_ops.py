"""The CPU kernels against the reference, which the other tests hold against dense arithmetic."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.cpu import ops

TOLERANCE = [(torch.float32, 2e-5, 2e-5), (torch.bfloat16, 2e-2, 1e-2)]


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCE)
@pytest.mark.parametrize("width", [16, 40, 576, 2049])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_norms_match_the_reference(dtype, atol, rtol, width, num_tokens):
    torch.manual_seed(0)
    x, residual = torch.randn(2, num_tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), atol=atol, rtol=rtol
    )
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    torch.testing.assert_close(
        ops.add_rms_norm(x, residual, weight, 1e-5), expected, atol=atol, rtol=rtol
    )
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCE)
@pytest.mark.parametrize("width", [16, 40, 1536])
def test_silu_mul_matches_the_reference_and_saturates(dtype, atol, rtol, width):
    torch.manual_seed(0)
    gate_up = (20 * torch.randn(5, 2 * width)).to(dtype)
    gate_up[0, :2] = torch.tensor([-1000.0, 1000.0])
    torch.testing.assert_close(
        ops.silu_mul(gate_up), reference.silu_mul(gate_up), atol=atol, rtol=rtol
    )


def test_not_a_number_stays_not_a_number():
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    x[1, 3] = torch.nan
    result = ops.rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-5)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 20)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_rope_and_kv_write_match_the_reference(
    make_attention_case, dtype, atol, rtol, num_heads, num_kv_heads, head_dim, normed, rotated
):
    case = make_attention_case(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
    )
    norms = torch.rand(2, head_dim).to(dtype) + 0.5 if normed else (None, None)
    results = []
    for implementation in (reference, ops):
        qkv, storage = case.qkv.clone(), case.storage.clone()
        kv_cache = storage.view(len(storage), 3, *case.kv_cache.shape[1:])[:, 1]
        cos_sin = case.cos_sin if rotated else None
        implementation.rope_store_kv(
            qkv, cos_sin, case.positions, kv_cache, case.kv_slot, *norms, 1e-6
        )
        results.append((qkv, storage))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCE)
@pytest.mark.parametrize("traffic", ["decode", "prefill", "chunked", "mixed"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 8), (8, 8, 64, 16), (8, 2, 128, 16), (3, 1, 20, 4)],
)
@pytest.mark.parametrize("window", [0, 6])
def test_attention_matches_the_reference(
    make_attention_case, dtype, atol, rtol, traffic, num_heads, num_kv_heads, head_dim, block_size,
    window,
):  # fmt: skip
    case = make_attention_case(
        traffic=traffic, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, dtype=dtype,
    )  # fmt: skip
    arguments = (case.qkv, case.kv_cache, case.index, case.scale, window)
    torch.testing.assert_close(
        ops.paged_attention(*arguments),
        reference.paged_attention(*arguments),
        atol=atol,
        rtol=rtol,
    )


@pytest.mark.parametrize("window", [0, 100])
def test_attention_over_many_rounds_of_keys_matches_the_reference(make_attention_case, window):
    case = make_attention_case(sequences=((1, 300), (70, 333), (1, 64), (64, 128)), block_size=8)
    arguments = (case.qkv, case.kv_cache, case.index, case.scale, window)
    torch.testing.assert_close(
        ops.paged_attention(*arguments),
        reference.paged_attention(*arguments),
        atol=2e-5,
        rtol=2e-5,
    )


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCE)
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "skewed", "identical"])
@pytest.mark.parametrize(
    ("in_features", "out_widths"), [(64, (64, 32, 32)), (576, (576,)), (20, (33, 7))]
)
@pytest.mark.parametrize("missing_targets", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_adapters_match_the_reference(
    make_adapter_case, dtype, atol, rtol, popularity, in_features, out_widths, missing_targets,
    strided,
):  # fmt: skip
    case = make_adapter_case(
        popularity=popularity, in_features=in_features, out_widths=out_widths,
        missing_targets=missing_targets, strided=strided, dtype=dtype,
    )  # fmt: skip
    expected, actual = case.out.clone(), case.out.clone()
    for implementation, out in ((reference, expected), (ops, actual)):
        implementation.add_adapters(out, case.x, case.storage, case.rows, case.index, case.span)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)
    assert torch.equal(actual[: case.index.num_base], case.out[: case.index.num_base])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_same_to_the_bit_alone_and_in_a_segment(make_adapter_case, dtype):
    case = make_adapter_case(popularity="identical", num_base=0, num_tokens=9, dtype=dtype)
    together, alone = case.out.clone(), case.out.clone()
    ops.add_adapters(together, case.x, case.storage, case.rows, case.index, case.span)
    for t in range(9):
        index = case.index._replace(
            token_slot=case.index.token_slot[:1],
            segment_start=torch.tensor([0, 1], dtype=torch.int32),
            max_segment=1,
        )
        one = slice(t, t + 1)
        ops.add_adapters(alone[one], case.x[one], case.storage, case.rows, index, case.span)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("num_base", [0, 4])
def test_a_step_without_adapters_changes_nothing(make_adapter_case, num_base):
    case = make_adapter_case(num_tokens=num_base, num_base=num_base)
    before = case.out.clone()
    ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert torch.equal(case.out, before)


def test_wrong_tensors_are_refused_by_name(make_adapter_case, make_attention_case):
    case = make_adapter_case()
    with pytest.raises(ValueError, match=r"torch\.float16"):
        ops.rms_norm(torch.ones(1, 16).half(), torch.ones(16).half(), 1e-5)
    with pytest.raises(ValueError, match="one dtype"):
        ops.rms_norm(torch.ones(1, 16), torch.ones(16).bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        ops.silu_mul(torch.ones(16, 4).T)
    with pytest.raises(ValueError, match="must all be bfloat16"):
        ops.add_adapters(
            case.out.bfloat16(), case.x, case.storage, case.rows, case.index, case.span
        )
    with pytest.raises(ValueError, match="columns"):
        ops.add_adapters(case.out[:, 1:], case.x, case.storage, case.rows, case.index, case.span)
    attention = make_attention_case()
    with pytest.raises(ValueError, match="strided over pages"):
        ops.paged_attention(
            attention.qkv, attention.kv_cache.transpose(2, 3), attention.index, attention.scale
        )
