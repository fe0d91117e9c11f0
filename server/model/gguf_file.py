"""A GGUF file: its metadata as a model config, its tensors dequantised and renamed."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from server.model.config import ModelConfig, ModelError, model_config
from server.model.rope import RopeFrequencies

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""Supported values of general.architecture; "llama" is Llama, Mistral and SmolLM2."""

_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """One .gguf file, memory-mapped; `read` dequantises a tensor to fp32."""

    def __init__(self, path: Path) -> None:
        """Read the metadata of `path`; ModelError if it is broken or of another architecture."""
        try:
            self._reader = _MetadataReader(path)
        except (ValueError, LookupError, OSError, struct.error) as error:
            raise ModelError(f"{path} is not a readable GGUF file: {error}") from error
        self.path = path
        self.metadata = {key: _value(field) for key, field in self._reader.fields.items()}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path} has architecture {self.architecture!r}; supported GGUF architectures are "
                f"{', '.join(ARCHITECTURES)}: give a Hugging Face directory for other families"
            )
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._rope_factors = stored.pop(_ROPE_FACTORS, None)
        names = self._hugging_face_names(list(stored))
        self._tensors = {names[name]: tensor for name, tensor in stored.items()}
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def config(self, name: str) -> ModelConfig:
        """The model's config under the public name `name`; ModelError for what is not served."""
        family = self.architecture
        if self._number("expert_count", 0):
            raise ModelError(f"{name} is a mixture of experts, which is not supported")
        values: dict[str, Any] = {"model_type": family, "hidden_act": "silu"}
        for key, entry in _CONFIG_KEYS.items():
            values[entry] = self._number(key)
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = self._number("attention.head_count_kv", heads)
        values["head_dim"] = self._head_dim(values["hidden_size"] // heads, name)
        values["vocab_size"] = self.shapes.get("model.embed_tokens.weight", (0,))[0]
        values["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        if family != "qwen2":
            values["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.shapes
        if family == "llama":
            values["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self.shapes
        if self._number("attention.sliding_window", 0):
            raise ModelError(f"{name} has a sliding window, not served from GGUF: use safetensors")
        values["rope_parameters"] = self._rope_parameters()
        eos = (self.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
        config = model_config(values, name, [int(token) for token in eos if token is not None])
        return replace(config, rope=self._with_rope_factors(config.rope))

    def read(self, name: str) -> Tensor:
        """The tensor that transformers calls `name`, in fp32; KeyError if there is none."""
        tensor = self._tensors[name]
        try:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{name} in {self.path} is quantised in a way that cannot be read: {error}"
            ) from error
        weights = weights.astype(np.float32, copy=False)
        num_heads = self._number("attention.head_count")
        if self.architecture == "llama" and ".q_proj." in name:
            weights = _unpermuted(weights, num_heads)
        if self.architecture == "llama" and ".k_proj." in name:
            weights = _unpermuted(weights, self._number("attention.head_count_kv", num_heads))
        return torch.from_numpy(np.require(weights, requirements=["C", "W"]))

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
        factors = torch.from_numpy(np.array(self._rope_factors.data, dtype=np.float32))
        if factors.numel() != len(rope.inv_freq):
            raise ModelError(
                f"{self.path} has {factors.numel()} factors in {_ROPE_FACTORS} for "
                f"{len(rope.inv_freq)} frequencies"
            )
        return rope._replace(inv_freq=tuple((torch.tensor(rope.inv_freq) / factors).tolist()))

    def _hugging_face_names(self, stored: list[str]) -> dict[str, str]:
        """GGUF name to transformers' name; a tensor that the family has not keeps its own."""
        num_layers = self._number("block_count")
        names = gguf.get_tensor_name_map(ARCHITECTURES[self.architecture], num_layers)
        modules = ["model.embed_tokens", "model.norm", "lm_head"]
        modules += [f"model.layers.{n}.{path}" for n in range(num_layers) for path in _MODULES]
        by_gguf = {names.get_name(module): module for module in modules}
        renamed = {}
        for name in stored:
            module, _, kind = name.rpartition(".")
            renamed[name] = f"{by_gguf[module]}.{kind}" if module in by_gguf else name
        return renamed


_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class _MetadataReader(gguf.GGUFReader):  # type: ignore[misc]
    """GGUFReader that steps over arrays of strings: the vocabulary alone takes it seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        kinds = gguf.GGUFValueType
        is_array = raw_type == kinds.ARRAY
        if not is_array or self._get(orig_offs, np.uint32)[0] != kinds.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        file, end = memoryview(self.data), orig_offs + 12
        for _ in range(int(self._get(orig_offs + 4, np.uint64)[0])):
            end += 8 + struct.unpack_from("<Q", file, end)[0]
        return end - orig_offs, [], [], [kinds.ARRAY, kinds.STRING]


def _value(field: Any) -> Any:
    """A field's value; None for an array of strings."""
    return field.contents() if field.data else None


def _unpermuted(weights: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head with its rotated halves apart, from llama.cpp's interleaved pairs."""
    pairs = weights.reshape(num_heads, -1, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
