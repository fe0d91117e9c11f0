"""The Triton adapter kernels, interpreted, against the reference; and how many are launched."""

from __future__ import annotations

import dataclasses
import importlib
import itertools

import pytest
import torch

from kernels import reference

HALF_UNIT = [  # dtype, the largest relative error of rounding to it once, with 1 % for fp32 sums
    (torch.bfloat16, 1.01 * 2**-8),
    (torch.float16, 1.01 * 2**-11),
]
CASES = [
    {"popularity": "distinct", "num_tokens": 9},
    {"popularity": "uniform", "num_tokens": 8, "num_base": 0},
    {"popularity": "skewed", "num_tokens": 60, "num_base": 9},
    {"popularity": "identical", "num_tokens": 37},
    {"popularity": "identical", "num_tokens": 85, "out_widths": (40,)},
    {"num_tokens": 12, "out_widths": (192, 64), "missing_targets": True},
    {"num_tokens": 50, "num_slots": 3, "missing_targets": True, "ranks": (1, 6, 17)},
    {"in_features": 20, "out_widths": (12, 4, 4), "strided": True},
    {"in_features": 20, "out_widths": (12, 4, 4), "strided": True, "popularity": "identical"},
]


def check_against_reference(ops, case, rtol, atol):
    expected = case.out.clone()
    reference.add_adapters(expected, case.x, case.storage, case.rows, case.index, case.span)
    ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    torch.testing.assert_close(case.out, expected, rtol=rtol, atol=atol)


class Recorder:
    """Stands for a kernel: notes the grid of each launch, then launches it."""

    launches_them = True

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        self.launches.append((self.kernel.__name__, grid))
        return self.kernel[grid] if self.launches_them else lambda *args, **keywords: None


@pytest.fixture
def launches(triton_ops, monkeypatch):
    recorded = []
    for module, operation in itertools.product(("bgmv", "sgmv"), ("shrink", "expand")):
        place = importlib.import_module(f"kernels.triton.{module}")
        name = f"_{module}_{operation}_kernel"
        monkeypatch.setattr(place, name, Recorder(getattr(place, name), recorded))
    return recorded


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_add_adapters_equals_the_reference(triton_ops, make_adapter_case, arguments):
    check_against_reference(triton_ops, make_adapter_case(**arguments), 1e-5, 1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), HALF_UNIT, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_base"), [(8, 2), (50, 2)], ids=["bgmv", "sgmv"])
def test_16_bit_results_are_the_exact_ones_rounded_once(
    triton_ops, make_adapter_case, num_tokens, num_base, dtype, rtol
):
    case = make_adapter_case(dtype=dtype, num_tokens=num_tokens, num_base=num_base)
    case.out[num_base:] = 0.0  # so that no large base output hides what shrink and expand lose
    exact = case.expected()
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    torch.testing.assert_close(case.out.float(), exact, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "num_splits"), [(8, 3), (50, 4)], ids=["bgmv", "sgmv"])
def test_inputs_split_over_programs_give_the_same_sum(
    triton_ops, launches, make_adapter_case, num_tokens, num_splits
):
    case = make_adapter_case(in_features=2304, num_tokens=num_tokens, ranks=(1, 6, 8, 17))
    check_against_reference(triton_ops, case, 1e-4, 1e-4)
    (_, shrink), _ = launches
    assert shrink[2] == num_splits


@pytest.mark.parametrize("num_tokens", [9, 50])
def test_base_rows_stay_bit_identical(triton_ops, make_adapter_case, num_tokens):
    case = make_adapter_case(num_base=5, num_tokens=num_tokens, dtype=torch.bfloat16)
    case.x[:5] = torch.nan
    case.out[:5, ::2] = torch.nan
    before = case.out.clone()
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert torch.equal(case.out[:5].view(torch.int16), before[:5].view(torch.int16))
    assert bool(case.out[5:].isfinite().all())


@pytest.mark.parametrize("num_tokens", [8, 50])
def test_the_same_step_gives_the_same_bits(triton_ops, make_adapter_case, num_tokens):
    results = []
    for _ in range(2):
        case = make_adapter_case(num_tokens=num_tokens, dtype=torch.bfloat16)
        triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
        results.append(case.out)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("num_tokens", "operation"), [(8, "bgmv"), (50, "sgmv")], ids=["decode", "prefill"]
)
def test_a_span_of_three_targets_takes_two_launches(
    triton_ops, launches, make_adapter_case, num_tokens, operation
):
    case = make_adapter_case(num_tokens=num_tokens)
    assert (case.index.max_segment >= 16) == (operation == "sgmv")
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    names = [name for name, _ in launches]
    assert names == [f"_{operation}_shrink_kernel", f"_{operation}_expand_kernel"]


def test_no_program_is_started_for_base_tokens(triton_ops, launches, make_adapter_case):
    case = make_adapter_case(num_tokens=18, num_base=11)
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert [grid[0] for _, grid in launches] == [7, 7]


@pytest.mark.parametrize("num_base", [0, 4])
def test_a_step_without_adapters_launches_nothing(
    triton_ops, launches, make_adapter_case, num_base
):
    case = make_adapter_case(num_tokens=num_base, num_base=num_base)
    before = case.out.clone()
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert launches == []
    assert torch.equal(case.out, before)


def with_segments(case, lengths):
    """The case, of distinct slots and no base tokens, with as many tokens of each as `lengths`."""
    repeats = torch.tensor(lengths)
    start = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    index = case.index._replace(
        token_slot=case.index.token_slot.repeat_interleave(repeats),
        segment_start=start,
        max_segment=max(lengths),
    )
    x, out = (matrix.repeat_interleave(repeats, dim=0) for matrix in (case.x, case.out))
    return dataclasses.replace(case, index=index, x=x, out=out)


@pytest.mark.parametrize(
    "lengths",
    [(16,), (1, 33, 1, 1), (15, 17, 16, 32, 31), (32, 1, 64, 2), (*[1] * 126, 17, *[1] * 3)],
    ids=["one", "skewed", "uneven", "even", "more_than_a_round_of_the_search"],
)
def test_tiles_cover_segments_of_any_lengths(triton_ops, make_adapter_case, lengths):
    case = make_adapter_case(
        popularity="distinct", num_tokens=len(lengths), num_base=0, ranks=(2,),
        in_features=8, out_widths=(8,),
    )  # fmt: skip
    check_against_reference(triton_ops, with_segments(case, lengths), 1e-5, 1e-5)


def test_a_long_segment_among_many_short_ones_starts_few_idle_programs(
    triton_ops, launches, make_adapter_case, monkeypatch
):
    """One prefill of 512 tokens and 31 decodes: 16 tiles and 31, and at most one more each."""
    monkeypatch.setattr(Recorder, "launches_them", False)
    case = make_adapter_case(popularity="distinct", num_tokens=32, num_base=0, dtype=torch.bfloat16)
    case = with_segments(case, (512, *[1] * 31))
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert [(name, grid[0]) for name, grid in launches] == [
        ("_sgmv_shrink_kernel", 48),
        ("_sgmv_expand_kernel", 48),
    ]


def captured(case, max_span_rows):
    """The case as a captured graph sees it: no base tokens known, every count an upper bound."""
    index = case.index._replace(
        segment_start=torch.arange(len(case.x) + 1, dtype=torch.int32),
        segment_slot=case.index.token_slot,
        num_base=0,
        max_segment=1,
        max_span_rows=max_span_rows,
    )
    return dataclasses.replace(case, index=index)


@pytest.mark.parametrize(
    ("popularity", "num_base"), [("uniform", 0), ("distinct", 5), ("identical", 5), ("uniform", 9)]
)
def test_a_captured_step_leaves_tokens_without_a_slot_alone(
    triton_ops, make_adapter_case, popularity, num_base
):
    """Wherever they lie, and whatever their rows hold; the others are the reference's."""
    case = make_adapter_case(
        popularity=popularity, num_tokens=9, num_base=num_base, ranks=(1, 6, 17)
    )
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    token_slot = case.index.token_slot[order]
    case = dataclasses.replace(
        case, x=case.x[order], out=case.out[order],
        index=case.index._replace(token_slot=token_slot),
    )  # fmt: skip
    is_base = token_slot < 0
    case.x[is_base] = torch.nan
    case.out[is_base] = torch.nan
    expected = case.out.clone()
    reference.add_adapters(expected, case.x, case.storage, case.rows, case.index, case.span)
    case = captured(case, max_span_rows=96)
    triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert bool(case.out[is_base].isnan().all())
    torch.testing.assert_close(case.out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_captured_step_is_launched_the_same_whatever_adapters_it_has(
    triton_ops, launches, make_adapter_case, monkeypatch
):
    monkeypatch.setattr(Recorder, "launches_them", False)
    for popularity, num_base in (("distinct", 0), ("identical", 3), ("uniform", 12)):
        case = make_adapter_case(popularity=popularity, num_tokens=12, num_base=num_base)
        case = captured(case, max_span_rows=192)
        triton_ops.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    assert [name for name, _ in launches[:2]] == ["_bgmv_shrink_kernel", "_bgmv_expand_kernel"]
    assert launches == launches[:2] * 3


def test_other_dtypes_are_refused_by_name(triton_ops, make_adapter_case):
    case = make_adapter_case()
    with pytest.raises(ValueError, match=r"storage is torch\.bfloat16 .* x is torch\.float32"):
        triton_ops.add_adapters(
            case.out, case.x, case.storage.bfloat16(), case.rows, case.index, case.span
        )


def test_columns_that_are_not_contiguous_are_refused_by_name(triton_ops, make_adapter_case):
    case = make_adapter_case()
    with pytest.raises(ValueError, match=r"out has stride 2 along its last axis"):
        triton_ops.add_adapters(
            case.out.repeat(1, 2)[:, ::2], case.x, case.storage, case.rows, case.index, case.span
        )
