"""The base model's linear layer against a double-precision product."""

from __future__ import annotations

import pytest
import torch

from server.model.linear import Linear

CASES = [  # dtype, atol, rtol
    (torch.float32, 1e-5, 1e-5),
    (torch.float16, 1e-3, 1e-3),
    (torch.bfloat16, 1e-6, 2**-8),
]


def random_case(out_features, in_features, num_rows, dtype):
    generator = torch.Generator().manual_seed(out_features + num_rows)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    return weight, bias, x


@pytest.mark.parametrize("num_rows", [0, 1, 2, 31, 32, 33, 512])
@pytest.mark.parametrize("shape", [(96, 64), (37, 40), (1, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), CASES)
def test_is_the_exact_product_rounded_once(shape, num_rows, with_bias, dtype, atol, rtol):
    weight, bias, x = random_case(*shape, num_rows, dtype)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    found = Linear(weight, bias if with_bias else None).forward(x)
    assert found.dtype == dtype
    assert found.is_contiguous()
    # beside the rounding: cancellation in the fp32 sum
    torch.testing.assert_close(found.double(), expected, atol=atol + 1e-4, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [2, 8, 33, 200])
def test_a_row_does_not_depend_on_the_others(num_rows, dtype):
    weight, bias, x = random_case(96, 64, num_rows, dtype)
    linear = Linear(weight, bias)
    others = x.clone()
    others[1:] = others[1:].flip(0) * 3 + 1
    assert torch.equal(linear.forward(x)[0], linear.forward(others)[0])


def test_takes_strided_rows():
    weight, _, x = random_case(37, 40, 6, torch.bfloat16)
    wide = torch.cat([x, x], dim=1)
    linear = Linear(weight)
    assert torch.equal(linear.forward(wide[:, :40]), linear.forward(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_rounded_once_to_the_dtype_that_is_asked_for(dtype):
    weight, bias, x = random_case(96, 64, 5, dtype)
    linear = Linear(weight, bias)
    found = linear.forward(x, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.to(dtype), linear.forward(x))


def test_int8_is_refused_where_it_cannot_be_multiplied():
    with pytest.raises(ValueError, match="int8 weights are made of bfloat16"):
        Linear(torch.zeros(4, 4), int8=True)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 3\] and bias \[5\]"):
        Linear(torch.zeros(4, 3), torch.zeros(5))
    with pytest.raises(ValueError, match=r"weight \[4\]"):
        Linear(torch.zeros(4))
