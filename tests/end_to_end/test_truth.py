"""Every answer of a mixed batch is that of transformers + PEFT run alone."""

from __future__ import annotations

import itertools

import pytest
import torch

LOGPROB_TOLERANCE = 1e-3


def prompts(num: int, vocab_size: int = 320) -> list[list[int]]:
    """Prompts of 3 to 40 random tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = itertools.cycle([3, 17, 40, 9, 26])
    return [
        torch.randint(4, vocab_size, (length,), generator=generator).tolist()
        for length, _ in zip(lengths, range(num), strict=False)
    ]


def assert_true(outcome, expected, digest):
    assert outcome.token_ids == expected.token_ids
    assert outcome.answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
    assert outcome.digests == {digest}
    assert outcome.finished[0].reason == "length"
    assert outcome.finished[0].adapter_digest == digest


def run_mixed(harness, adapters, oracle, num_base=4, num_tokens=12):
    """Submit all adapters and base rows, a few each turn, so that prefill meets decode."""
    digests = {name: harness.add(name, path) for name, path in adapters.items()}
    wanted = [*adapters, *[None] * num_base]
    asked = {}
    for number, (prompt, name) in enumerate(zip(prompts(len(wanted)), wanted, strict=True)):
        asked[harness.submit(prompt, name, num_tokens)] = (prompt, name)
        if number % 3 == 2:
            harness.turn()
    outcomes = harness.run()
    for request_id, (prompt, name) in asked.items():
        expected = oracle.answer(prompt, adapters[name] if name else None, num_tokens)
        assert_true(outcomes[request_id], expected, digests[name] if name else None)
    return outcomes


def test_adapters_change_what_the_base_says(tiny_oracle, tiny_adapters):
    prompt = prompts(1)[0]
    base = tiny_oracle.answer(prompt, None)
    assert all(
        tiny_oracle.answer(prompt, path).logprobs != base.logprobs
        for path in tiny_adapters.values()
    )


def test_a_mixed_batch_with_every_slot_full_is_true(
    make_harness, tiny_model, tiny_adapters, tiny_oracle
):
    harness = make_harness(
        tiny_model, dtype="float32", max_adapters=len(tiny_adapters), max_batched_tokens=48
    )
    run_mixed(harness, tiny_adapters, tiny_oracle)
    report = harness.report()
    assert len(report.adapters) == len(tiny_adapters)
    assert report.num_adapter_evictions == 0


def test_answers_are_true_after_eviction_and_reload(
    make_harness, tiny_model, tiny_adapters, tiny_oracle
):
    harness = make_harness(tiny_model, dtype="float32", max_adapters=3, max_batched_tokens=48)
    run_mixed(harness, tiny_adapters, tiny_oracle)
    run_mixed(harness, tiny_adapters, tiny_oracle)
    assert harness.report().num_adapter_evictions > len(tiny_adapters)


def test_answers_are_true_after_preemption(make_harness, tiny_model, tiny_adapters, tiny_oracle):
    names = ["rank-1", "rank-4-qv"]
    harness = make_harness(
        tiny_model, dtype="float32", block_size=4, pool_bytes=60 * 4 * 4 * 3 * 2 * 2 * 16,
        max_batched_tokens=64,
    )  # fmt: skip
    adapters = {name: tiny_adapters[name] for name in names}
    run_mixed(harness, adapters, tiny_oracle, num_base=6, num_tokens=40)
    assert harness.report().num_preemptions > 0


def test_a_name_uploaded_again_answers_with_its_new_weights_only(
    make_harness, tiny_model, tiny_adapters, tiny_oracle
):
    harness = make_harness(tiny_model, dtype="float32", max_adapters=2)
    old, new = tiny_adapters["rank-8"], tiny_adapters["rank-17"]
    prompt = prompts(2)[1]
    old_digest = harness.add("bot", old)
    before = harness.submit(prompt, "bot", 20)
    harness.turn(6)  # the old version is in the middle of its answer
    new_digest = harness.add("bot", new)
    after = harness.submit(prompt, "bot", 20)
    pinned = harness.submit(prompt, "bot@1", 20)
    outcomes = harness.run()
    assert_true(outcomes[before], tiny_oracle.answer(prompt, old, 20), old_digest)
    assert_true(outcomes[after], tiny_oracle.answer(prompt, new, 20), new_digest)
    assert_true(outcomes[pinned], tiny_oracle.answer(prompt, old, 20), old_digest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_rows_are_the_same_to_the_bit_beside_adapters(
    make_harness, tiny_model, tiny_adapters, dtype
):
    """The same batch, with base rows beside it in one run and adapters in the other."""

    def base_logprobs(beside):
        harness = make_harness(tiny_model, dtype=dtype)
        for name, path in tiny_adapters.items():
            harness.add(name, path)
        for name in filter(None, beside):  # resident before the batch is formed
            harness.submit([5], name, 1)
        harness.run()
        base = [harness.submit(prompt) for prompt in prompts(4)]
        for prompt, name in zip(prompts(8)[4:], beside, strict=True):
            harness.submit(prompt, name)
        outcomes = harness.run()
        return [outcomes[request_id].logprobs for request_id in base]

    names = ["rank-64", "rank-8", "rank-16-rslora", "rank-pattern"]
    assert base_logprobs(names) == base_logprobs([None] * 4)


def test_the_reference_kernels_give_the_same_answers(
    make_harness, tiny_model, tiny_adapters, tiny_oracle, monkeypatch
):
    from kernels import reference

    monkeypatch.setattr("server.engine.process.kernels_for", lambda _device: reference)
    adapters = {name: tiny_adapters[name] for name in ("rank-6-mlp", "rank-pattern", "rank-64")}
    harness = make_harness(tiny_model, dtype="float32", max_adapters=3)
    run_mixed(harness, adapters, tiny_oracle, num_base=1, num_tokens=6)


def test_a_cancelled_request_leaves_the_others_true(
    make_harness, tiny_model, tiny_adapters, tiny_oracle
):
    harness = make_harness(tiny_model, dtype="float32")
    digest = harness.add("bot", tiny_adapters["rank-8"])
    first, second = prompts(2)
    stopped, kept = harness.submit(first, "bot", 200), harness.submit(second, "bot")
    harness.turn(8)
    harness.cancel(stopped)
    outcomes = harness.run()
    assert outcomes[stopped].finished[0].reason == "cancelled"
    assert_true(outcomes[kept], tiny_oracle.answer(second, tiny_adapters["rank-8"]), digest)
    assert harness.report().num_kv_pages == 0
