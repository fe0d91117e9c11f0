"""A small base and adapters for it, written by hand: what the tests of the store share."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import TensorSpec, serialize_file

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape

HIDDEN, HEADS, KV, FFN = 36, 24, 12, 50


def small_layout(dtype="float32", page_elements=1024, num_layers=3, hidden=HIDDEN):
    """A base whose features are no multiples of the row alignment."""
    shapes = {
        "q_proj": (hidden, HEADS),
        "k_proj": (hidden, KV),
        "v_proj": (hidden, KV),
        "o_proj": (HEADS, hidden),
        "gate_proj": (hidden, FFN),
        "up_proj": (hidden, FFN),
        "down_proj": (FFN, hidden),
    }
    targets = tuple(TargetShape(name, *shapes[name]) for name in TARGET_PATHS)
    return BaseLayout("owner/tiny-llama", num_layers, targets, page_elements, dtype)


def write_tensors(path, tensors):
    """Write arrays as safetensors; uint16 arrays are bfloat16 bits."""
    kept = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16" if tensor.dtype == np.uint16 else tensor.dtype.name,
            shape=tensor.shape,
            data_ptr=tensor.ctypes.data,
            data_len=tensor.nbytes,
        )
        for name, tensor in kept.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})


class AdapterFiles:
    """An adapter for `layout` that a test changes before it is written."""

    def __init__(self, layout, targets=("q_proj", "down_proj"), rank=4, seed=0):
        random = np.random.default_rng(seed)
        self.config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "owner/tiny-llama",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(targets),
            "bias": "none",
        }
        self.tensors = {}
        for layer in range(layout.num_layers):
            for shape in layout.targets:
                if shape.name in targets:
                    key = self.key(layer, shape.name)
                    a = random.standard_normal((rank, shape.in_features), np.float32)
                    b = random.standard_normal((shape.out_features, rank), np.float32)
                    self.tensors[f"{key}.lora_A.weight"] = a
                    self.tensors[f"{key}.lora_B.weight"] = b

    @staticmethod
    def key(layer, target):
        return f"base_model.model.model.layers.{layer}.{TARGET_PATHS[target]}"

    def write(self, directory):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        write_tensors(directory / "adapter_model.safetensors", self.tensors)
        return directory


@pytest.fixture
def layout():
    return small_layout()


@pytest.fixture
def make_layout():
    return small_layout


@pytest.fixture
def adapter(layout):
    return AdapterFiles(layout)


@pytest.fixture
def make_adapter():
    return AdapterFiles


@pytest.fixture
def tensors_to_file():
    return write_tensors
