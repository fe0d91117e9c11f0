"""Loading checkpoints: sharded, converted, fused, and refused when they do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.model.config import ModelError
from server.model.source import resolve_source
from server.model.weights import expected_shapes, load_model


def load(directory, dtype=torch.float32, **options):
    return load_model(resolve_source(str(directory)), dtype, **options)


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A copy of a tiny qwen2 whose tensors a test may change: edit(tensors) rewrites them."""
    directory = tmp_path / "tiny"
    shutil.copytree(tiny_model("qwen2").directory, directory)

    def edit(change):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return directory

    return edit


def test_expected_shapes_are_those_of_transformers(each_tiny_model):
    config, _ = load(each_tiny_model.directory)
    state = each_tiny_model.model.state_dict()
    assert expected_shapes(config) == {name: tuple(t.shape) for name, t in state.items()}


def test_shards_are_the_same_model(tiny_model, tmp_path):
    tiny = tiny_model("qwen3")
    tiny.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _, whole = load(tiny.directory)
    _, sharded = load(tmp_path)
    assert torch.equal(whole.embedding, sharded.embedding)
    assert torch.equal(whole.head, sharded.head)
    for one, other in zip(whole.layers, sharded.layers, strict=True):
        for name, tensor in vars(one).items():
            assert tensor is None or torch.equal(tensor, getattr(other, name)), name


def test_projections_are_fused_in_the_order_of_the_targets(tiny_model):
    tiny = tiny_model("qwen2")
    _, weights = load(tiny.directory)
    attention, mlp = tiny.model.model.layers[1].self_attn, tiny.model.model.layers[1].mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(weights.layers[1].qkv, torch.cat([linear.weight for linear in qkv]))
    assert torch.equal(weights.layers[1].qkv_bias, torch.cat([linear.bias for linear in qkv]))
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    assert torch.equal(weights.layers[1].gate_up, gate_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_converted_while_loading(tiny_model, dtype):
    tiny = tiny_model("qwen2")
    _, weights = load(tiny.directory, dtype)
    assert torch.equal(weights.embedding, tiny.model.model.embed_tokens.weight.to(dtype))
    tensors = [tensor for tensor in vars(weights.layers[0]).values() if tensor is not None]
    assert {tensor.dtype for tensor in tensors} == {dtype}


def test_a_tied_head_is_the_embedding_itself(tiny_model):
    _, weights = load(tiny_model("smollm2_tied").directory)
    assert weights.head is weights.embedding


def test_a_head_of_its_own_is_used_even_where_the_config_ties_it(tiny_model, tmp_path):
    shutil.copytree(tiny_model("smollm2_tied").directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path)
    _, weights = load(tmp_path)
    assert torch.equal(weights.head, weights.embedding + 1)


def test_progress_counts_the_layers(tiny_model):
    calls = []
    load(tiny_model("qwen2").directory, progress=lambda *call: calls.append(call))
    assert calls == [("weights", done, 3) for done in range(4)]


def test_missing_unknown_and_misshapen_tensors_are_named(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=f"misses {name}"):
        load(checkpoint(lambda tensors: tensors.pop(name)))
    with pytest.raises(ModelError, match=rf"misshapen {name} \[3, 32\], not \[48, 32\]"):
        load(checkpoint(lambda tensors: tensors.update({name: torch.zeros(3, 32)})))
    fixed = {name: torch.zeros(48, 32), "model.layers.3.mlp.up_proj.weight": torch.zeros(48, 32)}
    with pytest.raises(ModelError, match=r"unknown model\.layers\.3\.mlp\.up_proj\.weight"):
        load(checkpoint(lambda tensors: tensors.update(fixed)))


def test_many_missing_tensors_are_counted(checkpoint):
    def drop_most(tensors):
        for name in list(tensors)[4:]:
            del tensors[name]

    with pytest.raises(ModelError, match=r"and \d+ more"):
        load(checkpoint(drop_most))


def test_cached_frequencies_of_old_checkpoints_are_ignored(checkpoint):
    cached = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    config, _ = load(checkpoint(lambda tensors: tensors.update(cached)))
    assert config.num_layers == 3


def test_quantised_tensors_are_refused(checkpoint):
    quantised = {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}
    with pytest.raises(ModelError, match=r"model\.norm\.weight .* dtype I8"):
        load(checkpoint(lambda tensors: tensors.update(quantised)))


def test_a_directory_without_safetensors_is_refused_with_a_remedy(tiny_model, tmp_path):
    shutil.copy(tiny_model("qwen2").directory / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"only \.bin weights.*save_pretrained"):
        load(tmp_path)


def test_broken_and_missing_files_are_named(checkpoint):
    directory = checkpoint(lambda tensors: None)
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is broken"):
        load(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "lost.safetensors"}}))
    with pytest.raises(ModelError, match=r"lost\.safetensors is missing"):
        load(directory)
    index.write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json is broken"):
        load(directory)
