"""GGUF files written by the gguf package from tiny models, read back against the originals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import gguf
import pytest
import torch
import transformers

import kernels.reference as reference
from server.model.config import ModelError, read_model_config
from server.model.decoder import Decoder
from server.model.gguf_file import GgufFile
from server.model.source import resolve_source
from server.model.weights import load_model

MODELS = {"smollm2_tied": "llama", "llama_all_biases": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
QUANTISATIONS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0"]


def permuted(weights, num_heads):
    """Rows as llama.cpp orders them: the two halves of each head interleaved."""
    halves = weights.reshape(num_heads, 2, -1, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def stored(name, tensor, config, arch):
    """A tensor as llama.cpp's converter would order it."""
    if arch == "llama" and ".q_proj." in name:
        return permuted(tensor, config.num_attention_heads)
    if arch == "llama" and ".k_proj." in name:
        return permuted(tensor, config.num_key_value_heads)
    return tensor


def write_gguf(path, model, arch, quantisation="F32", extra=None, rope_factors=None):
    """Write the model; returns its state dict as the file's precision leaves it."""
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{arch}.{key}", value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    kept = write_tensors(writer, model, arch, quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def write_tensors(writer, model, arch, quantisation):
    arch_id = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(arch_id, model.config.num_hidden_layers)
    kept = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        data = stored(name, tensor, model.config, arch).contiguous().numpy()
        can_quantise = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType[quantisation if can_quantise else "F32"]
        packed = gguf.quantize(data, kind)
        module, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", packed, raw_dtype=kind)
        unpacked = torch.from_numpy(gguf.dequantize(packed, kind).copy())
        rows = stored(name, torch.arange(len(data)), model.config, arch)
        kept[name] = torch.empty_like(unpacked)
        kept[name][rows] = unpacked
    return kept


def logits_from_file(path, prompts, paged_batch, teacher_forced):
    config, weights = load_model(resolve_source(str(path)), torch.float32)
    decoder = Decoder(config, weights, reference, torch.device("cpu"), torch.float32)
    batch = paged_batch(config)
    batch.add_sequence(prompts[0])
    return teacher_forced(decoder, batch)[0]


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_tensor_is_what_was_written(name, quantisation, tiny_model, tmp_path):
    path = tmp_path / "tiny.gguf"
    kept = write_gguf(path, tiny_model(name).model, MODELS[name], quantisation)
    file = GgufFile(path)
    assert set(file.shapes) == set(kept)
    for tensor_name, tensor in kept.items():
        assert torch.equal(file.read(tensor_name), tensor), tensor_name


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_decoder_is_the_same_as_from_safetensors(
    name, tiny_model, prompts, tmp_path, paged_batch, teacher_forced
):
    tiny = tiny_model(name)
    write_gguf(tmp_path / "tiny.gguf", tiny.model, MODELS[name])
    found = logits_from_file(tmp_path / "tiny.gguf", prompts, paged_batch, teacher_forced)
    expected = logits_from_file(tiny.directory, prompts, paged_batch, teacher_forced)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["smollm2_tied", "qwen2"])
def test_quantised_logits_equal_those_of_transformers(
    name, tiny_model, prompts, tmp_path, paged_batch, teacher_forced
):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model(name).model, MODELS[name], "Q8_0")
    quantization = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=quantization
    )
    with torch.inference_mode():
        expected = model(prompts[0][None]).logits[0]
    found = logits_from_file(path, prompts, paged_batch, teacher_forced)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_rope_factors_of_llama_3_are_honoured(
    tiny_model, prompts, tmp_path, paged_batch, teacher_forced
):
    scaled = tiny_model("llama3_scaled_rope")
    plain = 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)
    factors = plain / scaled.model.model.rotary_emb.inv_freq
    assert factors.max() > 2
    path = tmp_path / "tiny.gguf"
    write_gguf(path, scaled.model, "llama", rope_factors=factors)
    found = logits_from_file(path, prompts, paged_batch, teacher_forced)
    expected = logits_from_file(scaled.directory, prompts, paged_batch, teacher_forced)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_yarn_scaling_is_honoured(tiny_model, prompts, tmp_path, paged_batch, teacher_forced):
    scaled = tiny_model("qwen2_yarn_tied")
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    extra = {f"rope.scaling.{key}": value for key, value in keys.items()}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, scaled.model, "qwen2", extra=extra)
    found = logits_from_file(path, prompts, paged_batch, teacher_forced)
    expected = logits_from_file(scaled.directory, prompts, paged_batch, teacher_forced)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_config_is_read_from_the_metadata(tiny_model, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("qwen3").model, "qwen3")
    config = GgufFile(path).config("tiny")
    assert (config.name, config.family, config.head_dim, config.qk_norm) == (
        "tiny",
        "qwen3",
        16,
        True,
    )
    assert (config.num_layers, config.vocab_size, config.max_context) == (3, 64, 128)
    assert config.eos_token_ids == (2, 5)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("name", [*sorted(MODELS), "qwen2_yarn_tied"])
def test_the_config_is_that_of_the_directory(name, tiny_model, tmp_path):
    tiny, arch, extra = tiny_model(name), name.split("_")[0].replace("smollm2", "llama"), {}
    if "yarn" in name:
        extra = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        extra["rope.scaling.original_context_length"] = 32
    write_gguf(tmp_path / "tiny.gguf", tiny.model, arch, extra=extra)
    expected = read_model_config(tiny.directory, "tiny")
    found = GgufFile(tmp_path / "tiny.gguf").config("tiny")
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps)  # fp32 in the file
    same = {"rms_norm_eps": expected.rms_norm_eps, "eos_token_ids": expected.eos_token_ids}
    assert replace(found, **same) == expected


def test_reading_a_plain_file_leaves_transformers_and_gguf_alone():
    script = (
        "import sys; from server.model.gguf_file import GgufFile; "
        "from server.model.source import resolve_source; "
        "file = GgufFile(resolve_source('embedded').path); file.config('x'); "
        "file.read('model.norm.weight'); file.read('model.layers.0.mlp.down_proj.weight'); "
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"transformers", "gguf"} & set(run.stdout.split())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"attention.sliding_window": 4}, "sliding window"),
        ({"attention.head_count_kv": 0}, r"llama\.attention\.head_count_kv = 0, not a count"),
        ({"attention.head_count_kv": 2.5}, r"llama\.attention\.head_count_kv = 2.5, not a count"),
        ({"rope.dimension_count": 4}, r"rope\.dimension_count 4 .* 8 features"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope type 'longrope'"),
        ({"rope.scaling.type": "yarn"}, r"rope\.scaling\.factor = None"),
    ],
)
def test_what_is_not_served_is_refused_by_name(extra, message, tiny_model, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("smollm2_tied").model, "llama", extra=extra)
    with pytest.raises(ModelError, match=message):
        GgufFile(path).config("tiny")


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"'gemma2'.*llama, qwen2, qwen3"):
        GgufFile(path)


def test_a_file_cut_anywhere_is_refused(tiny_model, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("smollm2_tied").model, "llama")
    whole = path.read_bytes()
    for length in (0, 3, 20, 200, 700, 1500, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            GgufFile(path)


def test_the_embedded_model_is_read_whole():
    source = resolve_source("embedded")
    file = GgufFile(source.path)
    config = file.config(source.name)
    assert (config.num_layers, config.hidden_size, config.head_dim) == (30, 576, 64)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (9, 3, 49152)
    assert config.eos_token_ids == (2,)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(source.path).tensors}
    down = reader["blk.29.ffn_down.weight"]
    expected = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(file.read("model.layers.29.mlp.down_proj.weight"), expected)


def test_a_tensor_that_cannot_be_dequantised_is_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_tensor("output_norm.weight", torch.zeros(8, dtype=torch.int32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"model\.norm\.weight .* cannot be read"):
        GgufFile(path).read("model.norm.weight")


@pytest.mark.slow
def test_the_embedded_model_has_the_logits_of_transformers(paged_batch, teacher_forced):
    source = resolve_source("embedded")
    quantization = transformers.GgufConfig(gguf_file=source.path.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.path.parent,
        gguf_file=source.path.name,
        dtype=torch.float32,
        quantization_config=quantization,
    )
    token_ids = torch.arange(100, 49000, 3200)
    found = logits_from_file(source.path, [token_ids], paged_batch, teacher_forced)
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
