"""Reading configs: the families' differences, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from adapters_store.layout import TARGET_PATHS
from server.model.config import ModelError, model_config, read_model_config


def values_of(family, **changes):
    return transformers.AutoConfig.for_model(family, **changes).to_dict()


def config_of(family, **changes):
    return model_config(values_of(family, **changes), "tiny", [])


@pytest.mark.parametrize(
    "family",
    ["gemma", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe", "granite", "t5", None],
)
def test_an_unknown_family_is_refused_by_name(family):
    with pytest.raises(ModelError, match=rf"model_type {family!r}.*llama.*qwen3.*smollm3"):
        model_config({"model_type": family}, "tiny", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised.*'gptq'"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads.*3 KV heads"),
        ({"head_dim": 3}, "odd head_dim 3"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a valid llama config"),
        ({"vocab_size": "many"}, "not a valid llama config"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(changes, message):
    with pytest.raises(ModelError, match=message):
        model_config(values_of("llama") | changes, "tiny", [])


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 64,
            "long_factor": [2.0] * 64,
            "factor": 2.0,
            "original_max_position_embeddings": 512,
        },
    ],
)
def test_rotary_kinds_that_depend_on_the_length_are_refused_by_name(parameters):
    with pytest.raises(ModelError, match=f"rope type '{parameters['rope_type']}'"):
        config_of("llama", rope_parameters={"rope_theta": 1e4, **parameters})


def test_partial_rotation_is_refused():
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ModelError, match=r"partial_rotary_factor 0\.5"):
        config_of("llama", rope_parameters=parameters)


def test_rope_scaling_of_older_config_files_is_honoured():
    values = values_of("llama", num_hidden_layers=1)
    del values["rope_parameters"]
    old = values | {"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = values | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}
    assert model_config(old, "tiny", []).rope == model_config(new, "tiny", []).rope
    assert model_config(old, "tiny", []).rope.inv_freq[0] == 0.25


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, (0, 0)),
        ("mistral", {"sliding_window": 7}, (7, 7)),
        ("mistral", {"sliding_window": None}, (0, 0)),
        ("qwen2", {"sliding_window": 7}, (0, 0)),
        (
            "qwen2",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            (0, 7),
        ),
        (
            "qwen3",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0},
            (7, 7),
        ),
    ],
)
def test_each_layer_has_the_window_that_its_family_gives_it(family, changes, windows):
    assert config_of(family, num_hidden_layers=2, **changes).layer_windows == windows


def test_layer_types_that_are_not_served_are_refused():
    with pytest.raises(ModelError, match="alternates layer_types"):
        config_of("mistral", layer_types=["full_attention"] * 32)
    with pytest.raises(ModelError, match="chunked_attention"):
        config_of("qwen3", num_hidden_layers=1, layer_types=["chunked_attention"])


def test_biases_and_norms_follow_the_family():
    qwen2, qwen3, llama = (config_of(name) for name in ("qwen2", "qwen3", "llama"))
    assert (qwen2.attention_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    assert (llama.attention_bias, llama.mlp_bias, llama.qk_norm) == (False, False, False)
    biased = config_of("llama", attention_bias=True, mlp_bias=True)
    assert (biased.attention_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_smollm3_rotates_all_but_every_fourth_layer():
    rotates = config_of("smollm3", num_hidden_layers=8).layer_rotates
    assert rotates == (True, True, True, False) * 2


def test_layout_gives_the_shape_of_every_target():
    config = config_of(
        "qwen3",
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=3,
    )
    layout = config.layout(4096, "bfloat16")
    shapes = [(target.name, target.in_features, target.out_features) for target in layout.targets]
    features = [(32, 64), (32, 32), (32, 32), (64, 32), (32, 48), (32, 48), (48, 32)]
    assert shapes == [(name, *io) for name, io in zip(TARGET_PATHS, features, strict=True)]
    assert (layout.page_elements, layout.dtype, layout.num_layers) == (4096, "bfloat16", 3)
    assert config.kv_elements_per_token == 2 * 3 * 2 * 16


def test_end_of_sequence_ids_of_both_config_files_are_joined(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values_of("llama", eos_token_id=7)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert read_model_config(tmp_path, "tiny").eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "m.M"}}', "own model code"),
    ],
)
def test_a_broken_config_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_model_config(tmp_path, "tiny")


def test_frequencies_are_those_of_transformers(each_tiny_model):
    config = read_model_config(each_tiny_model.directory, "tiny")
    rotary = each_tiny_model.model.model.rotary_emb
    assert torch.equal(torch.tensor(config.rope.inv_freq), rotary.inv_freq)
    assert config.rope.scale == rotary.attention_scaling
