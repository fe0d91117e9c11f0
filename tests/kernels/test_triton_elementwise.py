"""The Triton norm and activation kernels, interpreted, against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import reference

TOLERANCES = [  # dtype, rtol, atol
    (torch.float32, 1e-5, 1e-6),
    (torch.bfloat16, 2**-7, 1e-6),
    (torch.float16, 2**-10, 1e-6),
]


def random_rows(num_rows, width, dtype, seed=0):
    """[num_rows, width] whose rows lie farther apart than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width + 16, generator=generator).to(dtype)[:, :width]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES, ids=str)
@pytest.mark.parametrize("hidden", [576, 64, 100])
def test_rms_norm_equals_the_reference(triton_ops, hidden, dtype, rtol, atol):
    x, weight = random_rows(5, hidden, dtype), random_rows(1, hidden, dtype, seed=1)[0]
    expected = reference.rms_norm(x, weight, 1e-5)
    result = triton_ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES, ids=str)
def test_add_rms_norm_updates_the_residual_and_norms_what_was_stored(triton_ops, dtype, rtol, atol):
    x, weight = random_rows(5, 576, dtype), random_rows(1, 576, dtype, seed=1)[0]
    residual, expected_residual = (random_rows(5, 576, dtype, seed=2) for _ in range(2))
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    result = triton_ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1536, 20])
def test_silu_mul_equals_the_reference(triton_ops, width, dtype, rtol, atol):
    gate_up = random_rows(4, 2 * width, dtype)
    torch.testing.assert_close(
        triton_ops.silu_mul(gate_up), reference.silu_mul(gate_up), rtol=rtol, atol=atol
    )


def test_no_tokens_give_no_rows(triton_ops):
    empty = torch.empty(0, 64)
    weight = torch.ones(64)
    assert triton_ops.rms_norm(empty, weight, 1e-5).shape == (0, 64)
    assert triton_ops.add_rms_norm(empty, empty, weight, 1e-5).shape == (0, 64)
    assert triton_ops.silu_mul(empty).shape == (0, 32)


def test_columns_that_are_not_contiguous_are_refused_by_name(triton_ops):
    with pytest.raises(ValueError, match="gate_up has stride 2 along its last axis"):
        triton_ops.silu_mul(torch.ones(2, 64)[:, ::2])
    with pytest.raises(ValueError, match="weight has stride 2 along its last axis"):
        triton_ops.rms_norm(torch.ones(2, 32), torch.ones(64)[::2], 1e-5)
