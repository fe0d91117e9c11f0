"""The base model's weights: checked against its config, converted, fused for the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.model.checkpoint import SafetensorsCheckpoint
from server.model.config import ModelConfig, ModelError, read_model_config
from server.model.gguf_file import GgufFile

if TYPE_CHECKING:
    from torch import Tensor

    from server.model.checkpoint import Checkpoint
    from server.model.source import ModelSource

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): called as a long load goes on."""

_NUM_NAMED = 5
"""Most tensors that an error message names."""


@dataclass
class LayerWeights:
    """One decoder layer; projections that share their input are one weight, in this order."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [q_size + 2 kv_size, hidden]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o: Tensor  # [hidden, q_size]
    o_bias: Tensor | None
    post_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass
class Weights:
    """All weights on the CPU in one dtype. The decoder takes the layers out as it packs them."""

    embedding: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself where they are tied


def read_config(source: ModelSource) -> ModelConfig:
    """The config of `source`, without its weights; ModelError for a model that is not supported."""
    if source.is_gguf:
        return GgufFile(source.path).config(source.name)
    return read_model_config(source.path, source.name)


def load_model(
    source: ModelSource, dtype: torch.dtype, progress: Progress = lambda *_: None
) -> tuple[ModelConfig, Weights]:
    """Config and weights of `source`, in `dtype` (float32, bfloat16 or float16).

    `progress` is told of the stage "weights", in layers. Raises ModelError for a model that is not
    supported and for files that do not fit its config.
    """
    config = read_config(source)
    checkpoint: Checkpoint
    checkpoint = GgufFile(source.path) if source.is_gguf else SafetensorsCheckpoint(source.path)
    _check_shapes(config, checkpoint)
    return config, _read_weights(config, checkpoint, dtype, progress)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this config has, the head included."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for target in config.target_shapes():
        is_mlp = target.name in ("gate_proj", "up_proj", "down_proj")
        path = f"{'mlp' if is_mlp else 'self_attn'}.{target.name}"
        layer[f"{path}.weight"] = (target.out_features, target.in_features)
        if config.mlp_bias if is_mlp else _attention_bias(config, target.name):
            layer[f"{path}.bias"] = (target.out_features,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_dim,)
    for n in range(config.num_layers):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def _attention_bias(config: ModelConfig, target: str) -> bool:
    return config.o_bias if target == "o_proj" else config.attention_bias


def _check_shapes(config: ModelConfig, checkpoint: Checkpoint) -> None:
    expected, found = expected_shapes(config), checkpoint.shapes
    missing = expected.keys() - found.keys()
    if config.tie_word_embeddings:
        missing -= {"lm_head.weight"}
    unexpected = {name for name in found.keys() - expected.keys() if not _is_harmless(name)}
    misshapen = [
        f"{name} {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    for kind, names in (
        ("misses", sorted(missing)),
        ("has the unknown", sorted(unexpected)),
        ("has the misshapen", misshapen),
    ):
        if names:
            more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
            raise ModelError(
                f"the checkpoint of {config.name} {kind} {', '.join(names[:_NUM_NAMED])}{more}: "
                f"it is no {config.family} causal language model of the shape its config gives"
            )


def _is_harmless(name: str) -> bool:
    """Whether a tensor beyond the expected ones is known to be a mere cache of the config."""
    return name.endswith("rotary_emb.inv_freq")


def _read_weights(
    config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress
) -> Weights:
    def fused(*names: str) -> Tensor:
        """The tensors, one below the other, in one allocation of `dtype`."""
        shapes = [checkpoint.shapes[name] for name in names]
        out = torch.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=dtype)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            out[start : start + shape[0]] = checkpoint.read(name)
            start += shape[0]
        return out

    def fused_if_there(*names: str) -> Tensor | None:
        return fused(*names) if names[0] in checkpoint.shapes else None

    def layer(n: int) -> LayerWeights:
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        qkv = [f"{attention}.{name}_proj" for name in "qkv"]
        gate_up = [f"{mlp}.{name}_proj" for name in ("gate", "up")]
        return LayerWeights(
            input_norm=fused(f"model.layers.{n}.input_layernorm.weight"),
            qkv=fused(*(f"{name}.weight" for name in qkv)),
            qkv_bias=fused_if_there(*(f"{name}.bias" for name in qkv)),
            q_norm=fused_if_there(f"{attention}.q_norm.weight"),
            k_norm=fused_if_there(f"{attention}.k_norm.weight"),
            o=fused(f"{attention}.o_proj.weight"),
            o_bias=fused_if_there(f"{attention}.o_proj.bias"),
            post_norm=fused(f"model.layers.{n}.post_attention_layernorm.weight"),
            gate_up=fused(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=fused_if_there(*(f"{name}.bias" for name in gate_up)),
            down=fused(f"{mlp}.down_proj.weight"),
            down_bias=fused_if_there(f"{mlp}.down_proj.bias"),
        )

    progress("weights", 0, config.num_layers)
    embedding = fused("model.embed_tokens.weight")
    head = fused_if_there("lm_head.weight")
    layers = []
    for n in range(config.num_layers):
        layers.append(layer(n))
        progress("weights", n + 1, config.num_layers)
    norm = fused("model.norm.weight")
    return Weights(embedding, layers, norm, embedding if head is None else head)
