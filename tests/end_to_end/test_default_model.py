"""The truth bars on the embedded model itself: fp32 to 1e-3, bf16 against PEFT's own bf16."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from server.model.source import resolve_source
from server.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?", "How do I boil an egg?", "Tell me a joke.",
    "Why is the sky blue?", "Name three animals.", "What is a prime number?",
    "Write a sentence about rain.", "Who wrote Hamlet?", "What is 2 + 2?",
    "How far is the moon?", "Describe a tree.", "What do bees do?",
    "What is the opposite of hot?", "Give me a word that rhymes with cat.",
    "What is photosynthesis?", "How do I say hello in Spanish?", "What colour is grass?",
]  # fmt: skip
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def oracle(oracle_class):
    path = resolve_source("embedded").path
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    return oracle_class(model)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(resolve_source("embedded"))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def adapters(oracle, adapter_maker, recipes, tmp_path_factory):
    root = tmp_path_factory.mktemp("default-model-adapters")
    return {
        name: adapter_maker(oracle.model, root / name, seed, 0.03, **recipe)
        for seed, (name, recipe) in enumerate(recipes.items())
    }


def serve_mixed(harness, adapters, prompts):
    """Ask each adapter and the base, prefill beside decode; (outcome, prompt, adapter) of each."""
    for name, path in adapters.items():
        harness.add(name, path)
    wanted = [*adapters, *[None] * (len(prompts) - len(adapters))]
    asked = []
    for number, (prompt, name) in enumerate(zip(prompts, wanted, strict=True)):
        asked.append((harness.submit(prompt, name, NUM_TOKENS), prompt, name))
        if number % 4 == 3:
            harness.turn()
    outcomes = harness.run()
    return [(outcomes[request_id], prompt, name) for request_id, prompt, name in asked]


def test_fp32_answers_are_those_of_peft_run_alone(make_harness, oracle, adapters, prompts):
    harness = make_harness(
        "embedded", dtype="float32", max_adapters=len(adapters), max_batched_tokens=128,
        pool_bytes=1 << 30,
    )  # fmt: skip
    worst = 0.0
    for outcome, prompt, name in serve_mixed(harness, adapters, prompts):
        expected = oracle.answer(prompt, adapters[name] if name else None, NUM_TOKENS)
        assert outcome.token_ids == expected.token_ids, name
        errors = [abs(a - b) for a, b in zip(outcome.answer.logprobs, expected.logprobs)]  # noqa: B905
        worst = max(worst, *errors)
    assert worst <= 1e-3
    assert len(harness.report().adapters) == len(adapters)


def test_bf16_is_no_farther_from_the_truth_than_peft_is(
    make_harness, oracle, adapters, prompts, record_testsuite_property
):
    harness = make_harness("embedded", dtype="bfloat16", max_batched_tokens=128)
    served = serve_mixed(harness, adapters, prompts)
    ours, truth, theirs = [], [], []
    for outcome, prompt, name in served:
        directory = adapters[name] if name else None
        ours += outcome.answer.logprobs
        truth += oracle.logprobs(prompt, directory, outcome.token_ids)
    oracle.model.to(torch.bfloat16)
    try:
        for outcome, prompt, name in served:
            directory = adapters[name] if name else None
            theirs += oracle.logprobs(prompt, directory, outcome.token_ids)
    finally:
        oracle.model.to(torch.float32)
    figures = {
        "ours_to_peft": rms(ours, theirs),
        "ours_to_truth": rms(ours, truth),
        "peft_to_truth": rms(theirs, truth),
        "ours_to_peft_max": worst(ours, theirs),
        "ours_to_truth_max": worst(ours, truth),
        "peft_to_truth_max": worst(theirs, truth),
    }
    for name, value in figures.items():
        record_testsuite_property(name, round(value, 5))
    assert figures["ours_to_peft"] <= 5e-2, figures
    assert figures["ours_to_truth"] <= figures["peft_to_truth"], figures


def rms(left, right):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(left, right, strict=True)) / len(left))


def worst(left, right):
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
