"""Sampling follows a plain oracle over the whole vocabulary, and every request's own randomness."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from server.engine.request import Sampling
from server.engine.sampler import NUM_CANDIDATES, Draw, sample

VOCAB = 700


def logits_of(seed: int, num_rows: int = 1, vocab: int = VOCAB, spread: float = 2.0):
    """Distinct values: which of two equal ones comes first is nobody's promise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def draw(logits, sampling: Sampling, position: int = 0) -> int:
    return sample(logits, [Draw(sampling, position)])[0].token_id


def oracle(logits, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from, over the whole vocabulary, in fp64."""
    scaled = logits[0].double().numpy() / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_k > 0:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
        p[order[before >= sampling.top_p]] = 0
        p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def frequencies(logits, sampling: Sampling, num_draws: int) -> np.ndarray:
    rows = logits.expand(num_draws, -1)
    tokens = sample(rows, [Draw(sampling, position) for position in range(num_draws)])
    return np.bincount([t.token_id for t in tokens], minlength=logits.shape[1])


def chi_square_limit(degrees: int) -> float:
    """What chi-square exceeds once in a thousand times (Wilson and Hilferty's approximation)."""
    variance = 2 / (9 * degrees)
    return degrees * (1 - variance + 3.09 * variance**0.5) ** 3


def sampling_of(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, num_logprobs=None):
    return Sampling(
        max_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        num_logprobs=num_logprobs,
    )


def test_temperature_zero_takes_the_most_probable_token_whatever_else_is_set():
    logits = logits_of(0, num_rows=8)
    draws = [Draw(sampling_of(0.0, top_k=k, top_p=0.5, seed=k), k) for k in range(8)]
    tokens = [token.token_id for token in sample(logits, draws)]
    assert tokens == logits.argmax(dim=-1).tolist()


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        *product([0.7, 1.5], [0, 1, 5], [0.3, 1.0], [0.0, 0.2]),
        (1.0, 5, 0.9, 0.05),
        (3.0, NUM_CANDIDATES, 0.9, 0.0),
        (3.0, NUM_CANDIDATES + 1, 0.999, 0.0),
        (9.0, 0, 0.95, 0.001),
        (0.2, 10, 1e-6, 0.0),
        (1.0, 0, 1.0, 1.0),
    ],
)
def test_draws_follow_temperature_then_top_k_then_top_p_then_min_p(
    temperature, top_k, top_p, min_p
):
    logits = logits_of(1, vocab=NUM_CANDIDATES + 60)
    sampling = sampling_of(temperature, top_k, top_p, min_p)
    expected = oracle(logits, sampling)
    counts = frequencies(logits, sampling, num_draws=1500)
    support = expected > 0
    assert counts[~support].sum() == 0, "a token was drawn that is ruled out"
    if support.sum() == 1:
        assert counts[support][0] == 1500
        return
    # Rare tokens go into one class: chi-square wants a few draws in each.
    common = expected * 1500 >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * 1500
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert ((observed - wanted) ** 2 / wanted).sum() < chi_square_limit(len(wanted) - 1)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 50.0])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(40, 0.9, 0.0), (0, 0.9, 0.0), (0, 1, 0.1)])
def test_sorting_only_the_candidates_draws_as_sorting_everything_does(
    monkeypatch, temperature, top_k, top_p, min_p
):
    logits = logits_of(2)
    sampling = sampling_of(temperature, top_k, top_p, min_p, seed=4)
    shortcut = [draw(logits, sampling, position) for position in range(60)]
    monkeypatch.setattr("server.engine.sampler.NUM_CANDIDATES", VOCAB)
    assert [draw(logits, sampling, position) for position in range(60)] == shortcut


def test_a_vocabulary_below_the_candidates_is_sampled_whole():
    logits = logits_of(3, vocab=12)
    sampling = sampling_of(2.0, top_p=0.99)
    counts = frequencies(logits, sampling, num_draws=800)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(oracle(logits, sampling)))
    assert np.count_nonzero(counts) > 6


def test_seed_and_position_decide_whatever_the_other_rows_are():
    logits = logits_of(5, num_rows=32)
    draws = [
        Draw(sampling_of(0.9, top_k=30 * (n % 2), top_p=(1.0, 0.9)[n % 2], seed=n), 100 + n)
        for n in range(32)
    ]
    together = [token.token_id for token in sample(logits, draws)]
    alone = [draw(logits[n : n + 1], *draws[n]) for n in range(32)]
    assert together == alone
    backwards = sample(logits.flip(0), draws[::-1])
    assert [token.token_id for token in backwards][::-1] == together
    greedy = [Draw(sampling_of(0.0), 0)] * 31
    for n in (0, 31):
        mixed = sample(logits.roll(7, 0), [*greedy[:7], draws[0], *greedy[7:]])
        assert mixed[7].token_id == together[0], n


def test_other_seeds_and_other_positions_draw_anew():
    logits = torch.zeros(1, VOCAB)
    by_seed = {draw(logits, sampling_of(seed=seed)) for seed in range(50)}
    by_position = {draw(logits, sampling_of(), position) for position in range(50)}
    assert len(by_seed) > 40
    assert len(by_position) > 40


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_every_seed_that_a_message_can_hold_draws(seed):
    assert 0 <= draw(logits_of(6), sampling_of(seed=seed), 2**20) < VOCAB


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-46, 5e-324])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature):
    logits = logits_of(7)
    for top_p in (1.0, 0.9):
        assert draw(logits, sampling_of(temperature, top_p=top_p)) == int(logits.argmax())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.99), (9, 1.0)])
def test_the_ends_of_the_random_range_never_draw_a_token_without_probability(
    monkeypatch, uniform, top_k, top_p
):
    logits = logits_of(8)
    logits[0, [0, 1, -2, -1]] = -torch.inf
    monkeypatch.setattr("server.engine.sampler._uniform", lambda seed, position: uniform)
    sampling = sampling_of(top_k=top_k, top_p=top_p)
    assert oracle(logits, sampling)[draw(logits, sampling)] > 0


def test_logprobs_are_those_of_the_logits_before_temperature_and_truncation():
    logits = logits_of(9, num_rows=4)
    draws = [
        Draw(sampling_of(0.0, num_logprobs=3), 1),
        Draw(sampling_of(1.8, top_k=2, seed=3, num_logprobs=5), 2),
        Draw(sampling_of(0.4), 3),
        Draw(sampling_of(0.4, num_logprobs=0), 4),
    ]
    exact = logits.double().log_softmax(dim=-1)
    for n, (token, (sampling, _)) in enumerate(zip(sample(logits, draws), draws, strict=True)):
        count = sampling.num_logprobs
        if count is None:
            assert token.logprobs is None
            continue
        assert token.logprobs.chosen == pytest.approx(float(exact[n, token.token_id]), abs=1e-5)
        values, ids = exact[n].sort(descending=True)
        assert token.logprobs.top_ids == tuple(ids[:count].tolist())
        assert token.logprobs.top_logprobs == pytest.approx(values[:count].tolist(), abs=1e-5)


def test_logprobs_keep_fp32_accuracy_at_large_logits():
    logits = logits_of(10) + 3000
    token = sample(logits, [Draw(sampling_of(0.0, num_logprobs=1), 0)])[0]
    exact = float(logits.double().log_softmax(dim=-1).max())
    assert token.logprobs.chosen == pytest.approx(exact, abs=1e-5)


def test_asking_for_logprobs_changes_no_token():
    logits = logits_of(11, num_rows=16)
    plain = [Draw(sampling_of(0.8, seed=n), n) for n in range(16)]
    asking = [Draw(sampling_of(0.8, seed=n, num_logprobs=n % 3), n) for n in range(16)]
    assert [t.token_id for t in sample(logits, plain)] == [
        t.token_id for t in sample(logits, asking)
    ]


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t[0].item(),
        lambda t: bool(t[0] > 0),
        lambda t: int(t[1]),
        lambda t: float(t[2]),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t[[0, 1]],
        lambda t: t.unique(),
        lambda t: torch.tensor([1.0]),
    ],
)
def test_a_wait_for_the_device_is_seen(host_syncs, wait):
    values = torch.tensor([-1.0, 2.0, 3.0])
    with host_syncs:
        wait(values)
    assert len(host_syncs.seen) == 1


MIXED_SAMPLING = [
    sampling_of(0.0),
    sampling_of(0.7, seed=1),
    sampling_of(0.7, top_k=40, top_p=0.9, num_logprobs=3),
    sampling_of(0.0, num_logprobs=0),
    sampling_of(0.5, min_p=0.05, seed=2),
    sampling_of(0.6, top_k=NUM_CANDIDATES + 9, top_p=0.9),
    sampling_of(0.4, top_p=0.8, num_logprobs=5),
]


@pytest.mark.parametrize(
    "samplings",
    [[sampling_of(0.0)] * 5, [sampling_of(0.9)] * 5, MIXED_SAMPLING],
    ids=["greedy", "plain", "mixed"],
)
def test_the_host_waits_once_for_a_whole_batch(host_syncs, samplings):
    logits = logits_of(12, num_rows=len(samplings), spread=6.0)
    with host_syncs:
        tokens = sample(logits, [Draw(sampling, 9) for sampling in samplings])
    assert len(host_syncs.seen) == 1
    assert len(tokens) == len(samplings)


def test_a_row_that_needs_more_candidates_is_waited_for_once_more_and_alone(host_syncs):
    logits = logits_of(13, num_rows=3)
    logits[1] *= 0.01
    draws = [Draw(sampling_of(top_p=0.9, seed=n, num_logprobs=2), n) for n in range(3)]
    with host_syncs:
        tokens = sample(logits, draws)
    assert host_syncs.seen == ["cpu", "cpu"]
    assert tokens == [sample(logits[n : n + 1], [draws[n]])[0] for n in range(3)]


@pytest.mark.parametrize("samplings", [MIXED_SAMPLING, MIXED_SAMPLING[::-1]])
def test_every_kind_of_sampling_in_one_batch_says_what_it_says_alone(samplings):
    logits = logits_of(14, num_rows=len(samplings))
    draws = [Draw(sampling, n) for n, sampling in enumerate(samplings)]
    alone = [sample(logits[n : n + 1], [draw])[0] for n, draw in enumerate(draws)]
    assert sample(logits, draws) == alone


def test_bf16_logits_are_sampled_as_their_fp32_values():
    logits = logits_of(15, num_rows=len(MIXED_SAMPLING)).bfloat16()
    draws = [Draw(sampling, n) for n, sampling in enumerate(MIXED_SAMPLING)]
    assert sample(logits, draws) == sample(logits.float(), draws)


@pytest.mark.parametrize("top_k", [VOCAB + 1, 10**6])
def test_a_top_k_beyond_the_vocabulary_is_all_of_it(top_k):
    logits = logits_of(16)
    draws = [Draw(sampling_of(1.5, top_k=k, seed=n), n) for n in range(20) for k in (VOCAB, top_k)]
    tokens = sample(logits.expand(len(draws), -1), draws)
    assert tokens[::2] == tokens[1::2]


@pytest.mark.parametrize("vocab", [384, 300])
def test_greedy_takes_the_first_of_equal_logits(vocab):
    logits = torch.randn(9, vocab)
    for row, at in enumerate((0, 1, 127, 128, 129, 255, 256, 298, 299)):
        logits[row, at:] = torch.where(torch.rand(vocab - at) < 0.1, 50.0, 1.0)
        logits[row, at] = 50.0
    tokens = sample(logits, [Draw(sampling_of(0.0), 0)] * 9)
    assert [t.token_id for t in tokens] == [0, 1, 127, 128, 129, 255, 256, 298, 299]
