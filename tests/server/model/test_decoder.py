"""The decoder against transformers and PEFT, through the reference kernels."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch

import kernels.reference as reference
from kernels.ops import kernels_for
from server.model.decoder import Decoder
from server.model.linear import can_serve_int8
from server.model.source import resolve_source
from server.model.weights import load_model

# PEFT asks transformers for a property that the latter has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CPU = torch.device("cpu")
ADAPTERS = [
    {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["o_proj", "gate_proj", "down_proj"],
        "rank_pattern": {"down_proj": 9, "layers.1.mlp.gate_proj": 1},
        "alpha_pattern": {"o_proj": 2},
        "layers_to_transform": [0, 1],
    },
]


NEEDS_INT8 = pytest.mark.skipif(
    not can_serve_int8("cpu"), reason="this processor does not multiply int8 and bfloat16"
)


def build(directory, dtype=torch.float32, kernels=reference, *, int8=False):
    config, weights = load_model(resolve_source(str(directory)), dtype)
    return Decoder(config, weights, kernels, CPU, dtype, int8=int8)


def logits_of(model, token_ids):
    with torch.inference_mode():
        return model(token_ids[None]).logits[0].float()


def with_random_adapter(model, settings, seed):
    """A copy of the model with a PEFT adapter whose A and B are both random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    return adapted


def rank_rows(adapted):
    """(layer, target) to A, B and scaling of a PEFT model."""
    rows = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parts = name.split(".")
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            layer = int(parts[parts.index("layers") + 1])
            rows[layer, parts[-1]] = (a.detach(), b.detach(), module.scaling["default"])
    return rows


def test_logits_equal_those_of_transformers_in_every_family(
    each_tiny_model, prompts, paged_batch, teacher_forced
):
    decoder = build(each_tiny_model.directory)
    batch = paged_batch(decoder.config)
    for prompt in prompts:
        batch.add_sequence(prompt)
    for sequence, found in zip(batch.sequences, teacher_forced(decoder, batch), strict=True):
        expected = logits_of(each_tiny_model.model, sequence.token_ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama3_scaled_rope", "qwen2", "qwen3", "smollm3"])
def test_a_batch_of_base_and_adapters_equals_each_peft_model_alone(
    name, tiny_model, prompts, paged_batch, teacher_forced
):
    tiny = tiny_model(name)
    decoder = build(tiny.directory)
    batch = paged_batch(decoder.config)
    models = {-1: tiny.model}
    for slot, settings in enumerate(ADAPTERS):
        models[slot] = with_random_adapter(tiny.model, settings, seed=slot)
        batch.add_adapter(slot, rank_rows(models[slot]))
    for slot, prompt in zip((2, -1, 0, 1), prompts, strict=True):
        batch.add_sequence(prompt, slot)
    batch.add_sequence(prompts[0], slot=1)
    for sequence, found in zip(batch.sequences, teacher_forced(decoder, batch), strict=True):
        expected = logits_of(models[sequence.slot], sequence.token_ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        if sequence.slot >= 0:
            assert (expected - logits_of(tiny.model, sequence.token_ids)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_rows_are_bit_identical_whether_their_neighbours_use_adapters_or_not(
    dtype, tiny_model, prompts, paged_batch
):
    tiny = tiny_model("llama2_multi_head")
    decoder = build(tiny.directory, dtype)
    rows = rank_rows(with_random_adapter(tiny.model, ADAPTERS[1], seed=1))
    found = []
    for slot in (-1, 3):
        batch = paged_batch(decoder.config, dtype)
        batch.add_adapter(3, rows)
        batch.add_sequence(prompts[0])
        batch.add_sequence(prompts[2], slot)
        found.append(decoder.forward(batch.step([len(prompts[0]), len(prompts[2])])))
    num_base = len(prompts[0])
    assert torch.equal(found[0][:num_base], found[1][:num_base])
    assert not torch.equal(found[0][num_base:], found[1][num_base:])


@pytest.mark.parametrize(
    "name",
    ["llama3_scaled_rope", "mistral_sliding_window", "qwen2_yarn_tied", "qwen3", "smollm3_untied"],
)
def test_bf16_is_no_farther_from_fp32_than_transformers_bf16_is(
    name, tiny_model, prompts, paged_batch, teacher_forced
):
    tiny = tiny_model(name)
    decoder = build(tiny.directory, torch.bfloat16)
    batch = paged_batch(decoder.config, torch.bfloat16)
    for prompt in prompts:
        batch.add_sequence(prompt)
    rounded = copy.deepcopy(tiny.model).bfloat16()
    ours, theirs = [], []
    for sequence, found in zip(batch.sequences, teacher_forced(decoder, batch), strict=True):
        truth = logits_of(tiny.model, sequence.token_ids)
        ours.append((found - truth).square().mean())
        theirs.append((logits_of(rounded, sequence.token_ids) - truth).square().mean())
    assert torch.stack(ours).mean() <= torch.stack(theirs).mean()


@NEEDS_INT8
@pytest.mark.parametrize("name", ["llama_all_biases", "qwen2_yarn_tied", "qwen3", "smollm3"])
def test_int8_logits_are_close_to_those_of_bf16(name, tiny_model, prompts, paged_batch):
    tiny = tiny_model(name)
    found = {}
    for int8 in (False, True):
        decoder = build(tiny.directory, torch.bfloat16, int8=int8)
        batch = paged_batch(decoder.config, torch.bfloat16)
        for prompt in prompts:
            batch.add_sequence(prompt)
        found[int8] = decoder.forward(batch.step([len(prompt) for prompt in prompts]))
    error = found[True] - found[False]
    # a product is off by up to 1.5 % (test_packed_weight.py), and thirteen follow each other
    assert 0 < error.norm() <= 13**0.5 * 0.015 * found[False].norm()


@NEEDS_INT8
def test_int8_rows_are_the_same_to_the_bit_in_every_batch(tiny_model, prompts, paged_batch):
    tiny = tiny_model("qwen2")
    decoder = build(tiny.directory, torch.bfloat16, kernels_for("cpu"), int8=True)
    adapters = {
        slot: rank_rows(with_random_adapter(tiny.model, settings, seed=slot))
        for slot, settings in enumerate(ADAPTERS)
    }

    def logits(asked):
        batch = paged_batch(decoder.config, torch.bfloat16)
        for slot, rows in adapters.items():
            batch.add_adapter(slot, rows)
        for slot, prompt in asked:
            batch.add_sequence(prompt, slot)
        counts = [len(sequence.token_ids) for sequence in batch.sequences]
        return decoder.forward(batch.step(counts)).split(counts)

    asked = list(zip((-1, 0, 1, 2), prompts, strict=True))
    for (slot, prompt), beside in zip(asked, logits(asked), strict=True):
        (alone,) = logits([(slot, prompt)])
        assert torch.equal(alone, beside), slot


def test_only_the_wanted_rows_have_logits(tiny_model, prompts, paged_batch):
    decoder = build(tiny_model("qwen2").directory)
    batch = paged_batch(decoder.config)
    batch.add_sequence(prompts[0])
    batch.add_sequence(prompts[2])
    step = batch.step([13, 7])
    everything = decoder.forward(step)
    some = decoder.forward(step._replace(logit_rows=torch.tensor([19, 4])))
    torch.testing.assert_close(some, everything[[19, 4]], atol=1e-5, rtol=1e-5)
    assert some.dtype == torch.float32
    none = decoder.forward(step._replace(logit_rows=torch.tensor([], dtype=torch.int64)))
    assert none.shape == (0, decoder.config.vocab_size)


def test_a_step_of_base_tokens_only_launches_no_adapter_kernel(tiny_model, prompts, paged_batch):
    def refuse(*_):
        raise AssertionError("add_adapters was called")

    kernels = SimpleNamespace(**vars(reference))
    kernels.add_adapters = refuse
    decoder = build(tiny_model("qwen3").directory, kernels=kernels)
    batch = paged_batch(decoder.config)
    batch.add_sequence(prompts[0])
    assert decoder.forward(batch.step([13])).isfinite().all()


def test_the_decoder_takes_the_layers_out_of_the_weights(tiny_model):
    source = resolve_source(str(tiny_model("qwen3").directory))
    config, weights = load_model(source, torch.float32)
    Decoder(config, weights, reference, CPU, torch.float32)
    assert weights.layers == []
