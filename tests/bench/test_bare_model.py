"""A bare model says what transformers and PEFT say, at every position and in greedy answers."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.bare_model import BareModel
from bench.random_adapters import write_adapter
from bench.tiny_model import write_tiny_model
from server.config import Settings
from server.engine.spec import engine_spec

TOKENS = [7, 31, 100, 8, 3, 250, 99, 12, 64, 5]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model's directory, the spec of its engine, and an adapter of each of two ranks."""
    directory = tmp_path_factory.mktemp("bare")
    model = write_tiny_model(directory / "tiny")
    settings = Settings(model=str(model), device="cpu", dtype="float32", pool_bytes=1 << 20)
    spec = engine_spec(settings.model_copy(update={"max_adapters": 2}))
    adapters = {
        f"rank-{rank}": write_adapter(directory / f"rank-{rank}", spec.layout, rank, rank)
        for rank in (3, 8)
    }
    return model, spec, adapters


@pytest.fixture(scope="module")
def bare(made, tmp_path_factory):
    _, spec, adapters = made
    return BareModel(spec, adapters, tmp_path_factory.mktemp("data"))


@pytest.fixture(params=[None, "rank-3", "rank-8"])
def served(request, made):
    """The name of an adapter, and the model that PEFT makes of it."""
    model, _, adapters = made
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if request.param is not None:
        oracle = PeftModel.from_pretrained(oracle, adapters[request.param])
    return request.param, oracle.eval()


@pytest.mark.parametrize("first", [1, 4, len(TOKENS) - 1])
def test_logits_are_of_the_tokens_from_first_on(bare, served, first):
    name, oracle = served
    with torch.inference_mode():
        expected = oracle(torch.tensor([TOKENS])).logits[0, first - 1 : -1]
    found = bare.logits(TOKENS, name, first)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_answers_are_greedy_and_do_not_mix(bare, served):
    name, oracle = served
    prompts = [TOKENS, TOKENS[:4], TOKENS[::-1]]
    found = bare.answers(prompts, name, 6)
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert answer == logits.argmax(-1).tolist()
    assert bare.answers(prompts, name, 6) == found


def test_too_few_slots_are_refused_with_the_remedy(made, tmp_path):
    model, _, adapters = made
    settings = Settings(model=str(model), device="cpu", dtype="float32", max_adapters=1)
    spec = engine_spec(settings.model_copy(update={"pool_bytes": 1 << 20}))
    with pytest.raises(RuntimeError, match="no room for adapter rank-8: raise pool_bytes or max_a"):
        BareModel(spec, adapters, tmp_path)
