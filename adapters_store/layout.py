"""The base model as adapters see it: targets and their shapes, the page size, the dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

TARGET_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Targets in the order of the rank-row table, with their place under `model.layers.N`."""


@dataclass(frozen=True, slots=True)
class TargetShape:
    """One linear layer that adapters may change: y [out_features] = W x [in_features]."""

    name: str  # a key of TARGET_PATHS
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """What a packed image depends on; adapters are packed once for each layout."""

    model_name: str  # for messages only
    num_layers: int
    targets: tuple[TargetShape, ...]  # one for each key of TARGET_PATHS, in that order
    page_elements: int  # elements of one page of the pool
    dtype: str  # of the packed rows: "float32", "bfloat16" or "float16"

    @property
    def key(self) -> str:
        """16 hex digits that differ when an image packed for this layout would."""
        fields = {k: v for k, v in asdict(self).items() if k != "model_name"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
