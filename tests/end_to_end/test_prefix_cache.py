"""Answers that begin with cached keys are those of transformers + PEFT, too, and say so."""

from __future__ import annotations

import pytest
import torch

TOLERANCE = 1e-3
BLOCK = 4


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 320, (length,), generator=generator).tolist()


@pytest.fixture
def harness(make_harness, tiny_model):
    return make_harness(tiny_model, dtype="float32", block_size=BLOCK, max_batched_tokens=48)


def ask(harness, prompt, adapter_id=None, **wishes) -> tuple[object, int]:
    """One request alone: what came of it, and how many tokens of its prompt were cached."""
    request_id = harness.submit(prompt, adapter_id, **wishes)
    outcome = harness.run()[request_id]
    return outcome, outcome.finished[0].num_cached_tokens


def assert_true(outcome, expected):
    assert outcome.token_ids == expected.token_ids
    assert outcome.answer.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("adapter_id", [None, "rank-pattern", "rank-64"])
def test_a_prompt_that_comes_again_is_answered_the_same_from_the_cache(
    harness, tiny_adapters, tiny_oracle, adapter_id
):
    path = None
    if adapter_id is not None:
        path = tiny_adapters[adapter_id]
        harness.add(adapter_id, path)
    prompt = prompt_of(101)
    expected = tiny_oracle.answer(prompt, path)
    for num_cached in (0, 100):
        outcome, found = ask(harness, prompt, adapter_id)
        assert found == num_cached
        assert_true(outcome, expected)
    assert harness.report().num_cached_tokens == 100


def test_a_conversation_goes_on_from_the_keys_of_its_own_answer(harness, tiny_oracle):
    first = prompt_of(30)
    outcome, _ = ask(harness, first, num_tokens=20)
    second = [*first, *outcome.token_ids, *prompt_of(7, seed=1)]
    outcome, found = ask(harness, second)
    assert found == 48, "of 49 computed tokens the 12 full blocks"
    assert_true(outcome, tiny_oracle.answer(second, None))


def test_prompts_that_part_share_the_blocks_before(harness, tiny_oracle):
    system = prompt_of(42)
    for seed in (1, 2, 3):
        prompt = [*system, *prompt_of(9, seed)]
        outcome, found = ask(harness, prompt)
        assert found == (0 if seed == 1 else 40)
        assert_true(outcome, tiny_oracle.answer(prompt, None))


def test_requests_that_run_together_share_too(harness, tiny_oracle):
    system = prompt_of(24)
    prompts = [[*system, *prompt_of(5, seed)] for seed in range(4)]
    begun = harness.submit(prompts[0], None, 16)
    harness.turn(4)
    ids = [harness.submit(prompt, None, 16) for prompt in prompts[1:]]
    outcomes = harness.run()
    for request_id, prompt in zip([begun, *ids], prompts, strict=True):
        assert_true(outcomes[request_id], tiny_oracle.answer(prompt, None, 16))
    assert [outcomes[i].finished[0].num_cached_tokens for i in ids] == [24] * 3


def test_the_same_prompt_twice_at_once_is_true_for_both(harness, tiny_oracle):
    prompt = prompt_of(33)
    ids = [harness.submit(prompt, None, 16) for _ in range(2)]
    outcomes = harness.run()
    for request_id in ids:
        assert_true(outcomes[request_id], tiny_oracle.answer(prompt, None, 16))


def test_a_replaced_adapter_never_sees_a_key_of_the_weights_before(
    harness, tiny_adapters, tiny_oracle
):
    prompt = prompt_of(60)
    a, b = tiny_adapters["rank-8"], tiny_adapters["rank-pattern"]
    first, second = tiny_oracle.answer(prompt, a), tiny_oracle.answer(prompt, b)
    assert first.token_ids != second.token_ids, "the test would show nothing"
    # Replace, and roll back: the same name every time.
    for path, expected, num_cached in ((a, first, 0), (b, second, 0), (a, first, 56)):
        digest = harness.add("bot", path)
        outcome, found = ask(harness, prompt, "bot")
        assert found == num_cached
        assert outcome.digests == {digest}
        assert_true(outcome, expected)


def test_neither_base_nor_another_adapter_nor_another_salt_hits(
    harness, tiny_adapters, tiny_oracle
):
    prompt = prompt_of(60)
    for name in ("rank-8", "rank-17"):
        harness.add(name, tiny_adapters[name])
    for name, salt in ((None, ""), ("rank-8", ""), ("rank-17", ""), (None, "x"), ("rank-8", "x")):
        outcome, found = ask(harness, prompt, name, salt=salt)
        assert found == 0
        assert_true(outcome, tiny_oracle.answer(prompt, name and tiny_adapters[name]))
    assert ask(harness, prompt, "rank-8", salt="x")[1] == 56


def test_an_adapter_that_was_evicted_and_loaded_again_is_true_on_the_same_prompt(
    make_harness, tiny_model, tiny_adapters, tiny_oracle
):
    harness = make_harness(tiny_model, dtype="float32", block_size=BLOCK, max_adapters=1)
    prompt = prompt_of(40)
    for name in ("rank-8", "rank-17", "rank-8"):
        harness.add(name, tiny_adapters[name])
        outcome, found = ask(harness, prompt, name)
        assert found == 0, "its prefixes left with it"
        assert_true(outcome, tiny_oracle.answer(prompt, tiny_adapters[name]))
    assert harness.report().num_adapter_evictions == 2


@pytest.mark.parametrize(
    "settings", [{"prefix_cache": False}, {"adapter_memory_share": 0.3}], ids=["off", "split"]
)
def test_the_settings_for_comparison_are_as_true(
    make_harness, tiny_model, tiny_adapters, tiny_oracle, settings
):
    harness = make_harness(tiny_model, dtype="float32", block_size=BLOCK, **settings)
    harness.add("rank-8", tiny_adapters["rank-8"])
    prompt = prompt_of(40)
    expected = tiny_oracle.answer(prompt, tiny_adapters["rank-8"])
    found = []
    for _ in range(2):
        outcome, num_cached = ask(harness, prompt, "rank-8")
        assert_true(outcome, expected)
        found.append(num_cached)
    assert found == ([0, 0] if "prefix_cache" in settings else [0, 36])
