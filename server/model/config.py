"""What a base model is: its family and shape, read from a transformers config; refuses by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from server.model.rope import RopeFrequencies, rope_frequencies

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PretrainedConfig

FAMILIES = {
    "llama": "Llama 2 and 3, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3",
    "smollm3": "SmolLM3",
}
"""Supported `model_type`s of config.json, and what people call them."""


class ModelError(ValueError):
    """The base model cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder and everything in which the families differ."""

    name: str  # public name of the base model
    family: str  # a key of FAMILIES
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_context: int
    tie_word_embeddings: bool  # the head is the embedding, unless the checkpoint has both
    attention_bias: bool  # of q, k and v
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k
    rope: RopeFrequencies
    layer_rotates: tuple[bool, ...]  # False: a layer without positions (SmolLM3)
    layer_windows: tuple[int, ...]  # tokens that a query of the layer sees; 0 = all
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of k and v of one token over all layers: a page holds block_size times that."""
        return 2 * self.num_layers * self.kv_size

    def target_shapes(self) -> tuple[TargetShape, ...]:
        """The linear layers that adapters may change, in the order of TARGET_PATHS."""
        hidden, mlp, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        attention = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden))
        features = (*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden))
        return tuple(
            TargetShape(name, in_features, out_features)
            for name, (in_features, out_features) in zip(TARGET_PATHS, features, strict=True)
        )

    def layout(self, page_elements: int, dtype: str) -> BaseLayout:
        """What packed adapters depend on; dtype "float32", "bfloat16" or "float16"."""
        return BaseLayout(self.name, self.num_layers, self.target_shapes(), page_elements, dtype)


def read_model_config(directory: Path, name: str) -> ModelConfig:
    """The config of the Hugging Face model in `directory`.

    Raises ModelError for a family or feature that is not supported, and for a broken config.
    """
    values = _read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    eos = _token_ids(values.get("eos_token_id")) + _token_ids(generation.get("eos_token_id"))
    if "AutoModelForCausalLM" in (values.get("auto_map") or {}):
        raise ModelError(f"{name} brings its own model code (auto_map), which is never run here")
    return model_config(values, name, eos)


def model_config(values: dict[str, Any], name: str, eos_token_ids: Sequence[int]) -> ModelConfig:
    """The config from the entries of a config.json; ModelError as in `read_model_config`."""
    family = values.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(f"{key} ({label})" for key, label in FAMILIES.items())
        raise ModelError(f"model_type {family!r} of {name} is not supported; supported are {known}")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[family].from_dict(dict(values))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"the config of {name} is not a valid {family} config: {error}") from error
    return config_of(config, name, eos_token_ids)


def config_of(config: Any, name: str, eos_token_ids: Sequence[int]) -> ModelConfig:
    """The config from a transformers config, or whatever has its attributes; ModelError as above.

    Attributes that only some families have may be missing where they are off.
    """
    _refuse_unsupported(config, name)
    family = config.model_type
    num_layers, head_dim = config.num_hidden_layers, _head_dim(config)
    attention_bias = family == "qwen2" or bool(getattr(config, "attention_bias", False))
    try:
        rope = rope_frequencies(config, head_dim)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
    return ModelConfig(
        name=name,
        family=family,
        num_layers=num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        max_context=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        attention_bias=attention_bias,
        o_bias=attention_bias and family != "qwen2",
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        rope=rope,
        layer_rotates=_layer_rotates(config, name),
        layer_windows=_layer_windows(config, name),
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}: give the directory of a Hugging Face model"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


def _token_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _head_dim(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _refuse_unsupported(config: PretrainedConfig, name: str) -> None:
    if config.hidden_act != "silu":
        raise ModelError(f"{name} has activation {config.hidden_act!r}; supported is 'silu'")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{name} has quantised weights (quant_method {method!r}): give the unquantised model, "
            "or a GGUF file"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ModelError(f"{name} has {heads} heads, not a multiple of its {kv_heads} KV heads")
    if _head_dim(config) % 2:
        raise ModelError(f"{name} has odd head_dim {_head_dim(config)}, which cannot be rotated")


def _layer_rotates(config: PretrainedConfig, name: str) -> tuple[bool, ...]:
    """Whether each layer has rotary positions; `no_rope_layers` says 1 where it has."""
    flags = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    if len(flags) < config.num_hidden_layers:
        raise ModelError(
            f"{name} has {len(flags)} no_rope_layers for {config.num_hidden_layers} layers"
        )
    return tuple(bool(flag) for flag in flags[: config.num_hidden_layers])


def _layer_windows(config: PretrainedConfig, name: str) -> tuple[int, ...]:
    """Each layer's sliding window, as the family's code in transformers takes it."""
    num_layers = int(config.num_hidden_layers)
    if config.model_type == "llama":
        return (0,) * num_layers
    window = int(config.sliding_window or 0)
    if config.model_type == "mistral":
        if window and "full_attention" in (getattr(config, "layer_types", None) or []):
            raise ModelError(f"{name} alternates layer_types, which mistral does not; not served")
        return (window,) * num_layers
    kinds: list[str] = config.layer_types
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != num_layers:
        raise ModelError(
            f"{name} has layer_types {kinds}; supported is one of full_attention and "
            f"sliding_attention for each of {num_layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
