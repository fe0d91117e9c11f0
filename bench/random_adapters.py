"""PEFT directories of random adapters for a base layout, for the benches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from adapters_store.layout import TARGET_PATHS

if TYPE_CHECKING:
    from adapters_store.layout import BaseLayout


def write_adapter(directory: Path, layout: BaseLayout, rank: int, seed: int) -> Path:
    """Write an all-linear adapter, alpha = 2 · rank, bf16, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layout.num_layers):
        for target in layout.targets:
            prefix = f"base_model.model.model.layers.{layer}.{TARGET_PATHS[target.name]}"
            a = torch.randn(rank, target.in_features, generator=generator)
            b = torch.randn(target.out_features, rank, generator=generator)
            tensors[f"{prefix}.lora_A.weight"] = (a / target.in_features**0.5).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (0.02 * b).bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [target.name for target in layout.targets],
        "base_model_name_or_path": layout.model_name,
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory
