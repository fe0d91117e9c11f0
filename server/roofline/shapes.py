"""Shapes of base models: well-known ones by name, any other from its config.json.

Holds what bytes and operations depend on and nothing else, so that planning needs no torch; a
directory is read by the server's own reader, which does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from server.memory.page_pool import PageGeometry, choose_block_size

if TYPE_CHECKING:
    from server.model.config import ModelConfig

ITEM_BYTES = 2
"""Bytes of a weight, of an element of the KV cache and of an activation: plans are in 16 bits."""

DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes. Fields mean what those of `server.model.config.ModelConfig` mean."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int, ...] = ()  # one for each layer; empty: every layer sees all tokens

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """k and v of one token over all layers."""
        return 2 * self.num_layers * self.kv_size * ITEM_BYTES

    @property
    def targets(self) -> tuple[TargetShape, ...]:
        """The projections of one layer, in the order of TARGET_PATHS."""
        hidden, mlp, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        attention = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden))
        features = (*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden))
        return tuple(
            TargetShape(name, *sizes) for name, sizes in zip(TARGET_PATHS, features, strict=True)
        )

    @property
    def num_parameters(self) -> int:
        """Elements of all weights on the device; a tied head is counted once."""
        vocabulary = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        products = sum(target.in_features * target.out_features for target in self.targets)
        biases = self.attention_bias * (self.q_size + 2 * self.kv_size)
        biases += self.o_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        return vocabulary + self.num_layers * (products + biases + norms) + self.hidden_size

    def page_geometry(self) -> PageGeometry:
        """Of the pages that the server would choose."""
        heads = (self.num_layers, self.num_kv_heads, self.head_dim)
        return PageGeometry(*heads, choose_block_size(*heads, self.targets))

    def layout(self) -> BaseLayout:
        """What adapters are packed for."""
        page_elements = self.page_geometry().page_elements
        return BaseLayout(self.name, self.num_layers, self.targets, page_elements, DTYPE)


_KNOWN = (
    ModelShape("Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
    ModelShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8192),
    ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    ModelShape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, 131072),
    ModelShape("Mistral-7B", 32, 4096, 14336, 32, 8, 128, 32768, 32768),
    ModelShape("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 128, 152064, 32768, attention_bias=True),
    ModelShape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, 40960, qk_norm=True),
    ModelShape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, 8192, tie_word_embeddings=True),
)

SHAPES = {shape.name.lower(): shape for shape in _KNOWN}
"""By the name that `--model` takes, in lower case. Mistral-7B is v0.3, which has no window."""


def shape_of(config: ModelConfig) -> ModelShape:
    """The shape of a model that the server has read."""
    return ModelShape(**{field.name: getattr(config, field.name) for field in fields(ModelShape)})


def find_shape(model: str) -> ModelShape:
    """The shape called `model`, or that of the config.json in the directory `model`.

    Raises ValueError for an unknown name, and for a config of a model that cannot be served.
    """
    known = SHAPES.get(model.lower())
    if known is not None:
        return known
    directory = Path(model).expanduser()
    if not directory.is_dir():
        names = ", ".join(shape.name for shape in _KNOWN)
        raise ValueError(
            f"model {model!r} is not known and no directory: name one of {names}, or a directory "
            "with a config.json"
        )
    from server.model.config import read_model_config

    return shape_of(read_model_config(directory, directory.resolve().name))
