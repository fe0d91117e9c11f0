"""Every answer of a combination is that of W + the dense weighted sum of the adapters' deltas."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

LOGPROB_TOLERANCE = 1e-3
BLOCK = 4

MIXES = {
    "unequal ranks": {"rank-8": 0.7, "rank-17": 0.3},
    "other weights": {"rank-8": 0.3, "rank-17": 0.7},
    "mixed targets": {"rank-4-qv": 1.5, "rank-6-mlp": -0.5, "rank-1": 1.0},
    "ranks by pattern": {"rank-pattern": 0.5, "rank-32-layer-0": 0.25, "rank-16-rslora": -1.0},
    "scale 0.5": {"rank-8": 0.5},
    "scale -1": {"rank-8": -1.0},
}


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 320, (num_tokens,), generator=generator).tolist()


def assert_true(outcome, expected, digest):
    assert outcome.token_ids == expected.token_ids
    assert outcome.answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
    assert outcome.digests == {digest}
    assert outcome.finished[0].adapter_digest == digest


def truth(oracle, adapters, prompt, weights):
    return oracle.answer_of_sum(prompt, {adapters[name]: w for name, w in weights.items()})


@pytest.fixture
def harness_with(make_harness, tiny_model, tiny_adapters):
    """An engine whose store has all the adapters; keyword arguments are settings."""

    def build(**settings):
        harness = make_harness(tiny_model, dtype="float32", block_size=BLOCK, **settings)
        for name, path in tiny_adapters.items():
            harness.add(name, path)
        return harness

    return build


def test_combinations_their_members_and_the_base_are_true_in_one_batch(
    harness_with, tiny_adapters, tiny_oracle
):
    harness = harness_with(max_batched_tokens=48)
    asked = {}
    wanted = [*MIXES.values(), {"rank-8": 1.0}, {"rank-17": 1.0}, {}, {"rank-4-qv": 1.0}]
    for number, weights in enumerate(wanted):
        prompt = prompt_of(5 + 7 * number % 30, number)
        asked[harness.submit(prompt, weights or None)] = prompt, weights
        if number % 3 == 2:
            harness.turn()
    outcomes = harness.run()
    for request_id, (prompt, weights) in asked.items():
        digest = harness.image(weights).digest if weights else None
        assert_true(
            outcomes[request_id], truth(tiny_oracle, tiny_adapters, prompt, weights), digest
        )


def test_a_combination_is_what_peft_makes_of_it(harness_with, tiny_adapters, tiny_oracle):
    prompt, weights = prompt_of(20), MIXES["unequal ranks"]
    model = PeftModel.from_pretrained(tiny_oracle.model, tiny_adapters["rank-8"], "rank-8")
    try:
        model.load_adapter(tiny_adapters["rank-17"], "rank-17")
        model.add_weighted_adapter(
            list(weights), list(weights.values()), "mix", combination_type="cat"
        )
        model.set_adapter("mix")
        expected = type(tiny_oracle)(model).answer(prompt, None)
    finally:
        model.unload()
    harness = harness_with()
    request_id = harness.submit(prompt, weights)
    outcome = harness.run()[request_id]
    assert_true(outcome, expected, harness.image(weights).digest)


def test_weights_change_the_answer(tiny_oracle, tiny_adapters):
    prompt = prompt_of(20)
    answers = [truth(tiny_oracle, tiny_adapters, prompt, weights) for weights in MIXES.values()]
    base = tiny_oracle.answer(prompt, None)
    distinct = {tuple(answer.logprobs) for answer in (base, *answers)}
    assert len(distinct) == len(MIXES) + 1, "the tests above would show nothing"


def test_combinations_are_true_after_eviction_and_reload(harness_with, tiny_adapters, tiny_oracle):
    harness = harness_with(max_adapters=4)
    asked = {}
    for seed in range(2):
        for number, weights in enumerate(MIXES.values()):
            prompt = prompt_of(9 + number, seed)
            asked[harness.submit(prompt, weights, 6)] = prompt, weights
    outcomes = harness.run()
    for request_id, (prompt, weights) in asked.items():
        paths = {tiny_adapters[name]: w for name, w in weights.items()}
        expected = tiny_oracle.answer_of_sum(prompt, paths, 6)
        assert_true(outcomes[request_id], expected, harness.image(weights).digest)
    assert harness.report().num_adapter_evictions > 2


def test_only_the_same_weights_share_cached_prefixes(harness_with, tiny_adapters, tiny_oracle):
    harness = harness_with()
    prompt = prompt_of(41)
    weights, others = MIXES["unequal ranks"], MIXES["other weights"]
    for asked, num_cached in (
        ({"rank-8": 1.0}, 0),
        (weights, 0),
        (others, 0),
        ({"rank-8": 0.7}, 0),
        (weights, 40),
        (dict(reversed(weights.items())), 40),
        (others, 40),
    ):
        request_id = harness.submit(prompt, asked)
        outcome = harness.run()[request_id]
        assert outcome.finished[0].num_cached_tokens == num_cached
        expected = truth(tiny_oracle, tiny_adapters, prompt, asked)
        assert_true(outcome, expected, harness.image(asked).digest)
