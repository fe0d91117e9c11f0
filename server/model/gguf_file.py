"""A GGUF file: its metadata as a model config, its tensors dequantised and renamed."""

from __future__ import annotations

import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from server.model.config import ModelConfig, ModelError, config_of, model_config
from server.model.gguf_blocks import dequantise, num_bytes
from server.model.gguf_header import StoredTensor, read_header
from server.model.rope import RopeFrequencies

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Supported values of general.architecture; "llama" is Llama, Mistral and SmolLM2."""

_COUNTS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """One .gguf file, memory-mapped; `read` dequantises a tensor to fp32."""

    def __init__(self, path: Path) -> None:
        """Read the header of `path`; ModelError if it is broken or of another architecture."""
        self.path = path
        try:
            data = np.memmap(path, mode="c")
            header = read_header(data.data)
            self._data = torch.from_numpy(data)
        except (ValueError, OSError, OverflowError, struct.error) as error:
            raise self._unreadable(error) from error
        self.metadata = header.metadata
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path} has architecture {self.architecture!r}; supported GGUF architectures are "
                f"{', '.join(ARCHITECTURES)}: give a Hugging Face directory for other families"
            )
        for name, tensor in header.tensors.items():
            self._check_bytes(name, tensor)
        stored = dict(header.tensors)
        self._rope_factors = stored.pop(_ROPE_FACTORS, None)
        names = self._hugging_face_names()
        self._tensors = {names.get(name, name): tensor for name, tensor in stored.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def config(self, name: str) -> ModelConfig:
        """The model's config under the public name `name`; ModelError for what is not served."""
        family = self.architecture
        if self._number("expert_count", 0):
            raise ModelError(f"{name} is a mixture of experts, which is not supported")
        values: dict[str, Any] = {"model_type": family, "hidden_act": "silu"}
        for key, entry in _COUNTS.items():
            values[entry] = self._count(key)
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = self._count("attention.head_count_kv", heads)
        values["rms_norm_eps"] = self._number("attention.layer_norm_rms_epsilon")
        values["head_dim"] = self._head_dim(values["hidden_size"] // heads, name)
        values["vocab_size"] = self.shapes.get("model.embed_tokens.weight", (0,))[0]
        values["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        if family != "qwen2":
            values["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.shapes
        if family == "llama":
            values["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self.shapes
        else:
            values["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
            values["sliding_window"] = None
        if self._number("attention.sliding_window", 0):
            raise ModelError(f"{name} has a sliding window, not served from GGUF: use safetensors")
        values["rope_parameters"] = self._rope_parameters()
        eos = (self.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
        eos_token_ids = [int(token) for token in eos if token is not None]
        if values["rope_parameters"]["rope_type"] == "default":
            # All that matters is said: transformers, seconds to import, has nothing to add.
            config = config_of(SimpleNamespace(**values), name, eos_token_ids)
        else:
            config = model_config(values, name, eos_token_ids)
        return replace(config, rope=self._with_rope_factors(config.rope))

    def read(self, name: str) -> Tensor:
        """The tensor that transformers calls `name`, in fp32; KeyError if there is none."""
        tensor = self._tensors[name]
        try:
            weights = dequantise(self._bytes(tensor), tensor.kind, tensor.shape)
        except NotImplementedError as error:
            raise ModelError(
                f"{name} in {self.path} is quantised in a way that cannot be read: {error}"
            ) from error
        if self.architecture == "llama" and ".q_proj." in name:
            return _unpermuted(weights, self._count("attention.head_count"))
        if self.architecture == "llama" and ".k_proj." in name:
            num_heads = self._count("attention.head_count")
            return _unpermuted(weights, self._count("attention.head_count_kv", num_heads))
        return weights

    def _bytes(self, tensor: StoredTensor) -> Tensor:
        """The bytes of a tensor: [num_bytes] uint8."""
        return self._data[tensor.offset : tensor.offset + num_bytes(tensor.kind, tensor.shape)]

    def _check_bytes(self, name: str, tensor: StoredTensor) -> None:
        """Raise ModelError unless the file has all bytes of the tensor, in whole blocks."""
        try:
            end = tensor.offset + num_bytes(tensor.kind, tensor.shape)
        except ValueError as error:
            raise ModelError(f"{name} in {self.path} cannot be read: {error}") from error
        if tensor.offset % 8 or end > len(self._data):
            raise self._unreadable(f"{name} would end at byte {end} of {len(self._data)}")

    def _unreadable(self, why: object) -> ModelError:
        return ModelError(f"{self.path} is not a readable GGUF file: {why}")

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._number(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.path} has {self.architecture}.{key} = {value!r}, not a count")
        return value

    def _number(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float):
            raise ModelError(
                f"{self.path} has {self.architecture}.{key} = {value!r} where one number for all "
                "layers is supported"
            )
        return value

    def _head_dim(self, default: int, name: str) -> int:
        head_dim = self._number("attention.key_length", default)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._number(key, head_dim) != head_dim:
                raise ModelError(
                    f"{name} has {key} {self._number(key)} but keys of {head_dim} features; "
                    "they must be the same"
                )
        return int(head_dim)

    def _rope_parameters(self) -> dict[str, Any]:
        parameters = {"rope_type": "default", "rope_theta": self._number("rope.freq_base", 1e4)}
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "none":
            return parameters
        if kind not in ("linear", "yarn"):
            raise ModelError(f"{self.path} has rope type {kind!r}; supported are linear and yarn")
        parameters |= {"rope_type": kind, "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            key = "rope.scaling.original_context_length"
            parameters["original_max_position_embeddings"] = self._number(key)
        return parameters

    def _with_rope_factors(self, rope: RopeFrequencies) -> RopeFrequencies:
        """Frequencies divided by the factors in which llama.cpp keeps Llama 3's scaling."""
        if self._rope_factors is None:
            return rope
        stored = self._rope_factors
        factors = dequantise(self._bytes(stored), stored.kind, stored.shape)
        if factors.numel() != len(rope.inv_freq):
            raise ModelError(
                f"{self.path} has {factors.numel()} factors in {_ROPE_FACTORS} for "
                f"{len(rope.inv_freq)} frequencies"
            )
        return rope._replace(inv_freq=tuple((torch.tensor(rope.inv_freq) / factors).tolist()))

    def _hugging_face_names(self) -> dict[str, str]:
        """GGUF name to transformers' name of every weight and bias that a family may have."""
        modules = dict(_MODULES)
        for n in range(self._count("block_count")):
            modules |= {
                f"blk.{n}.{stored}": f"model.layers.{n}.{path}"
                for stored, path in _LAYER_MODULES.items()
            }
        return {
            f"{stored}.{kind}": f"{path}.{kind}"
            for stored, path in modules.items()
            for kind in ("weight", "bias")
        }


_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _unpermuted(weights: Tensor, num_heads: int) -> Tensor:
    """Rows of each head with its rotated halves apart, from llama.cpp's interleaved pairs."""
    pairs = weights.reshape(num_heads, -1, 2, *weights.shape[1:])
    return pairs.transpose(1, 2).reshape(weights.shape)
