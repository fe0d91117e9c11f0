"""Shapes are those that the server itself would read and choose pages for."""

from __future__ import annotations

import json
from math import prod

import pytest

from server.memory.page_pool import PageGeometry
from server.model.config import model_config
from server.model.weights import expected_shapes
from server.roofline.shapes import SHAPES, find_shape, shape_of

PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Mistral-7B": 7_248_023_552,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
}
"""As the models' pages on the hub count them."""

VALUES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


@pytest.fixture(params=FAMILIES)
def config(request):
    return model_config(VALUES | FAMILIES[request.param], request.param, ())


def test_every_known_model_has_its_published_number_of_parameters():
    counted = {shape.name: shape.num_parameters for shape in SHAPES.values()}
    assert counted == PARAMETERS


def test_parameters_are_the_elements_of_the_tensors_that_the_server_loads(config):
    shapes = expected_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert shape_of(config).num_parameters == sum(prod(shape) for shape in shapes.values())


def test_a_shape_has_the_targets_cache_and_layout_of_the_config(config):
    shape = shape_of(config)
    assert shape.targets == config.target_shapes()
    assert shape.kv_bytes_per_token == 2 * config.kv_elements_per_token
    assert shape.layer_windows == config.layer_windows
    assert shape.layout() == config.layout(shape.page_geometry().page_elements, "bfloat16")


@pytest.mark.parametrize(
    ("name", "page_bytes", "block_size"),
    [("Llama-3-8B", 2 << 20, 16), ("Qwen2.5-7B", 896 << 10, 16), ("SmolLM2-135M", 184_320, 8)],
)
def test_pages_are_those_that_the_operations_paper_names(name, page_bytes, block_size):
    shape = find_shape(name)
    heads = (shape.num_layers, shape.num_kv_heads, shape.head_dim)
    assert shape.page_geometry() == PageGeometry(*heads, block_size)
    assert 2 * shape.page_geometry().page_elements == page_bytes


def test_a_model_is_found_in_any_case():
    assert find_shape("LLAMA-3-8b") is find_shape("llama-3-8B") is SHAPES["llama-3-8b"]


def test_a_directory_needs_only_its_config(tmp_path):
    values = VALUES | FAMILIES["qwen3"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = model_config(values, tmp_path.name, ())
    assert find_shape(str(tmp_path)) == shape_of(config)


def test_a_directory_of_a_model_that_is_not_served_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        find_shape(str(tmp_path))


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        find_shape(str(tmp_path))


def test_an_unknown_model_is_refused_and_the_known_ones_are_named():
    with pytest.raises(
        ValueError, match="model 'llama-9' is not known and no directory"
    ) as refused:
        find_shape("llama-9")
    assert all(name in str(refused.value) for name in PARAMETERS)
