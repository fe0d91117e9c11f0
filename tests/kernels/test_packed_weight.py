"""Packed weights against dense products: bf16 exactly, int8 within its rounding."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu.packed_weight import PackedWeight, can_pack, pack, quantise
from kernels.cpu.runtime import has_features
from kernels.layout import RowReads, TargetSpan

KINDS = [
    pytest.param(
        int8,
        marks=pytest.mark.skipif(
            not has_features(feature), reason=f"this processor has no {feature}"
        ),
    )
    for int8, feature in ((False, "avx512bf16"), (True, "avx512vnni"))
]


def random_case(num_outputs, num_inputs, num_rows):
    generator = torch.Generator().manual_seed(num_outputs + num_rows)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    bias = torch.randn(num_outputs, generator=generator).bfloat16()
    return weight, bias, torch.randn(num_rows, num_inputs, generator=generator).bfloat16()


def whole_numbers(num_rows, num_inputs):
    """Inputs that int8 holds exactly: whole numbers up to 127, which each row has."""
    x = torch.randint(-127, 128, (num_rows, num_inputs)).bfloat16()
    x[:, 0] = 127
    return x


@pytest.mark.parametrize("int8", KINDS)
@pytest.mark.parametrize("num_rows", [0, 1, 11, 12, 13, 24, 25, 100])
@pytest.mark.parametrize("shape", [(96, 64), (37, 40), (1, 8), (65, 4)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_multiplies_as_the_dense_product(shape, num_rows, with_bias, dtype, int8):
    weight, bias, x = random_case(*shape, num_rows)
    stands_for = weight.double()
    if int8:
        x = whole_numbers(num_rows, shape[1])
        codes, scale = quantise(weight)
        stands_for = (codes.double() - 128) * scale.double()[:, None]
    expected = x.double() @ stands_for.T + (bias.double() if with_bias else 0)
    found = PackedWeight(weight, bias if with_bias else None, int8=int8).multiply(x, dtype)
    assert found.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * (30 if int8 else 1), rtol=rtol)


@pytest.mark.parametrize("num_inputs", [64, 576])
def test_int8_loses_little_of_ordinary_inputs(num_inputs):
    if not has_features("avx512vnni"):
        pytest.skip("this processor has no avx512vnni")
    weight, _, x = random_case(96, num_inputs, 20)
    expected = x.float() @ weight.float().T
    found = PackedWeight(weight, None, int8=True).multiply(x, torch.float32)
    assert (found - expected).norm() < 0.015 * expected.norm()


@pytest.mark.parametrize("int8", KINDS)
def test_a_row_is_the_same_to_the_bit_in_every_batch(int8):
    weight, bias, x = random_case(100, 64, 50)
    packed = PackedWeight(weight, bias, int8=int8)
    alone = torch.cat([packed.multiply(row[None], torch.bfloat16) for row in x])
    for num_rows in (2, 12, 13, 31, 50):
        assert torch.equal(packed.multiply(x[:num_rows], torch.bfloat16), alone[:num_rows])


@pytest.mark.parametrize("int8", KINDS)
def test_rows_that_are_asked_for_meanwhile_change_nothing(make_adapter_case, int8):
    case = make_adapter_case(num_tokens=40, dtype=torch.bfloat16)
    weight, bias, x = random_case(case.out.shape[1], case.x.shape[1], 40)
    packed = PackedWeight(weight, bias, int8=int8)
    reads = RowReads(case.storage, case.rows, case.index, case.span, x.shape[1])
    assert isinstance(case.span, TargetSpan)
    expected = packed.multiply(x, torch.float32)
    assert torch.equal(packed.multiply(x, torch.float32, reads), expected)


@pytest.mark.parametrize("int8", KINDS)
def test_zero_rows_stay_zero_and_not_a_number_stays_in_its_row(int8):
    weight, _, x = random_case(40, 64, 14)
    x[0], x[1, 5] = 0, torch.nan
    found = PackedWeight(weight, None, int8=int8).multiply(x, torch.float32)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2:].isfinite().all()


def test_quantised_weights_are_within_half_a_level():
    weight = random_case(33, 64, 1)[0]
    weight[7] = 0
    codes, scale = quantise(weight)
    error = ((codes.float() - 128) * scale[:, None] - weight.float()).abs()
    assert (error <= scale[:, None] * 0.501).all()


def test_panels_hold_every_weight_once_and_zeros_beside():
    weight = torch.arange(35 * 4, dtype=torch.float).view(35, 4).bfloat16()
    panels = pack(weight)  # [2, 2, 32, 2]
    assert panels.data_ptr() % 64 == 0
    assert torch.equal(panels.transpose(1, 2).reshape(64, 4)[:35], weight)
    assert (panels.transpose(1, 2).reshape(64, 4)[35:] == 0).all()


def test_what_cannot_be_packed_is_refused():
    odd = torch.zeros(8, 7).bfloat16()
    assert not can_pack(odd, int8=False)
    assert not can_pack(torch.zeros(8, 8), int8=False)
    with pytest.raises(ValueError, match=r"bfloat16 \[8, 7\] cannot be packed"):
        PackedWeight(odd, None, int8=False)


@pytest.mark.parametrize("int8", KINDS)
def test_inputs_of_another_shape_or_type_are_refused(int8):
    packed = PackedWeight(torch.zeros(8, 8).bfloat16(), None, int8=int8)
    for x in (torch.zeros(2, 8), torch.zeros(2, 6).bfloat16(), torch.zeros(8, 2).bfloat16().T):
        with pytest.raises(ValueError, match="contiguous rows of 8 in bfloat16"):
            packed.multiply(x, torch.bfloat16)
