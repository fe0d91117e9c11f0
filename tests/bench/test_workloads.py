"""The traces are those of the papers, and their parts do what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workloads import (
    BASE,
    POPULARITIES,
    SLORA_RANKS,
    RandomPrompts,
    adapter_ranks,
    named_trace,
    punica,
    punica_groups,
    slora,
    zipf,
)

GOLDEN = {
    (200, 1, 2, 1, 300): {
        "num_requests": 600,
        "num_distinct": 187,
        "adapter": [74, 190, 146, 119, 31],
        "num_prompt": [12, 473, 99, 177, 324],
        "num_output": [410, 43, 292, 195, 89],
        "due_seconds": [0.1598, 3.0856, 3.3633, 3.6635, 3.7529],
        "sums": (153447, 155474),
    },
    (2000, 1, 10, 1, 120): {
        "num_requests": 1200,
        "num_distinct": 907,
        "adapter": [749, 1901, 1463, 1197, 312],
        "num_prompt": [388, 467, 14, 36, 402],
        "num_output": [268, 357, 509, 359, 15],
        "due_seconds": [0.0503, 0.0879, 0.1038, 0.1707, 0.1846],
        "sums": (314805, 315809),
    },
    (200, 0.3, 2, 4, 300): {
        "num_requests": 600,
        "num_distinct": 163,
        "adapter": [7, 168, 70, 36, 0],
        "num_prompt": [12, 473, 99, 177, 324],
        "num_output": [410, 43, 292, 195, 89],
        "due_seconds": [0, 0, 0, 0.023, 0.023],
        "sums": (153447, 155474),
    },
}


@pytest.mark.parametrize("arguments", GOLDEN)
def test_sloras_workload_has_the_golden_values(arguments):
    trace, golden = slora(*arguments), GOLDEN[arguments]
    assert len(trace) == golden["num_requests"]
    assert trace.num_distinct == golden["num_distinct"]
    for name in ("adapter", "num_prompt", "num_output"):
        assert getattr(trace, name)[:5].tolist() == golden[name]
    np.testing.assert_allclose(trace.due_seconds[:5], golden["due_seconds"], atol=5e-5)
    assert (trace.num_prompt.sum(), trace.num_output.sum()) == golden["sums"]


@pytest.mark.parametrize(("alpha", "share"), [(0.6, 0.04), (0.3, 0.20), (0.1, 0.59)])
def test_a_small_alpha_gives_the_first_adapter_the_published_share(alpha, share):
    trace = slora(200, alpha, rate=200, cv=1, seconds=100)
    assert np.mean(trace.adapter == 0) == pytest.approx(share, abs=0.01)


def test_scaled_lengths_keep_popularity_and_bounds():
    long, short = slora(50, 1, 4, 1, 60), slora(50, 1, 4, 1, 60, lengths=(8, 64))
    assert short.adapter.tolist() == long.adapter.tolist()
    for lengths in (short.num_prompt, short.num_output):
        assert lengths.min() >= 8
        assert lengths.max() <= 63


@given(popularity=st.sampled_from(POPULARITIES), num_requests=st.integers(1, 400))
def test_punicas_groups_hold_every_request_once(popularity, num_requests):
    groups = punica_groups(popularity, num_requests)
    assert sum(groups) == num_requests
    assert min(groups) >= 1
    assert groups == sorted(groups, reverse=True)


@pytest.mark.parametrize(
    ("popularity", "num_distinct", "most"),
    [("distinct", 32, 1), ("uniform", 6, 6), ("skewed", 8, 11), ("identical", 1, 32)],
)
def test_punicas_mixes_of_a_batch_of_32_differ(popularity, num_distinct, most):
    trace = punica(popularity, 32)
    assert trace.num_distinct == num_distinct
    assert np.bincount(trace.adapter).max() == most


def test_punicas_prompts_are_lognormal_and_totals_uniform():
    trace = punica("uniform", 20000)
    total = trace.num_prompt + trace.num_output
    assert np.median(trace.num_prompt) == pytest.approx(17, abs=1)
    assert np.log(trace.num_prompt + 1.5).std() == pytest.approx(0.8, abs=0.03)
    assert total.mean() == pytest.approx(1024, rel=0.02)
    assert total.max() < 2048
    assert trace.num_prompt.min() >= 1
    assert trace.num_output.min() >= 2


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_zipf_shares_fall_with_the_power_of_the_rank(exponent):
    counts = np.bincount(zipf(100, exponent, 200_000).adapter, minlength=100)
    assert counts[0] / counts[9] == pytest.approx(10**exponent, rel=0.1)


@given(share=st.floats(0, 1), num_requests=st.integers(1, 200))
def test_a_base_share_changes_that_many_requests_and_nothing_else(share, num_requests):
    trace = zipf(10, 1.0, num_requests)
    mixed = trace.with_base_share(share)
    is_base = mixed.adapter == BASE
    assert is_base.sum() == round(share * num_requests)
    assert (mixed.adapter[~is_base] == trace.adapter[~is_base]).all()
    assert (mixed.num_prompt == trace.num_prompt).all()
    assert trace.base_only().num_distinct == 0


def test_a_base_share_above_one_is_refused():
    with pytest.raises(ValueError, match=r"1\.5 .* from 0 to 1"):
        zipf(4, 1.0, 8).with_base_share(1.5)


def test_arrivals_are_poisson_at_the_rate():
    due = zipf(4, 1.0, 20000).arriving(5.0).due_seconds
    gaps = np.diff(due)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)


def test_ranks_come_in_turn_or_shuffled_with_the_same_counts():
    ranks = adapter_ranks(10, SLORA_RANKS["S2"])
    assert ranks[:5] == [64, 32, 16, 8, 64]
    shuffled = adapter_ranks(10, SLORA_RANKS["S2"], shuffle_seed=1)
    assert shuffled != ranks
    assert sorted(shuffled) == sorted(ranks)


def test_a_named_workload_is_the_papers_with_adapters_that_are_registered():
    sizes = {"lengths": (8, 512), "max_total": 2048, "seed": 0}
    published = slora(2000, 1, 10, 1, 120)
    assert (named_trace("slora-1", 2000, 10, 1200, **sizes).adapter == published.adapter).all()
    mix = named_trace("punica-distinct", 8, 4, 40, **sizes)
    assert len(mix) == 40
    assert np.bincount(mix.adapter).tolist() == [5] * 8
    assert named_trace("zipf-1.5", 8, 4, 40, **sizes).num_distinct <= 8


@pytest.mark.parametrize("name", ["zip-1", "punica-even", "uniform"])
def test_an_unknown_workload_is_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match="slora-ALPHA, zipf-EXPONENT, punica-distinct"):
        named_trace(name, 8, 4, 10, lengths=(8, 64), max_total=64, seed=0)


def test_prompts_have_the_lengths_and_share_no_beginning():
    prompts = RandomPrompts(49152)
    texts = prompts.draw([5, 9]) + prompts.draw([5, 7])
    assert [len(text) for text in texts] == [5, 9, 5, 7]
    assert len({text[0] for text in texts}) == 4
    assert max(max(text) for text in texts) < 49152
