"""Tensors of a Hugging Face directory, by name, memory-mapped from its safetensors files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol, cast

from server.model.config import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Checkpoint(Protocol):
    """Named tensors of a model, under the names that transformers gives them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the floating-point dtype in which it is stored."""
        ...


class SafetensorsCheckpoint:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""

    def __init__(self, directory: Path) -> None:
        """Open the files of `directory`; ModelError if there are none, or one is broken."""
        from safetensors import SafetensorError, safe_open

        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                file: Any = safe_open(path, framework="pt")
                names: list[str] = file.keys()
                for name in names:
                    self.shapes[name] = _checked_shape(file.get_slice(name), name, path)
                    self._file_of[name] = file
            except FileNotFoundError:
                raise ModelError(f"{path} is missing: download the model again") from None
            except SafetensorError as error:
                raise ModelError(f"{path} is broken, download it again: {error}") from error

    def read(self, name: str) -> Tensor:
        return cast("Tensor", self._file_of[name].get_tensor(name))


def _checked_shape(tensor: Any, name: str, path: Path) -> tuple[int, ...]:
    dtype = tensor.get_dtype()
    if dtype not in _FLOAT_DTYPES:
        raise ModelError(
            f"{name} in {path} has dtype {dtype}; supported are {', '.join(_FLOAT_DTYPES)}: "
            "give the unquantised model"
        )
    return tuple(tensor.get_shape())


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [directory / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is broken, download it again: {error!r}") from error
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    if any(directory.glob("*.bin")):
        raise ModelError(
            f"{directory} has only .bin weights, which can run code when loaded: convert them with "
            "transformers, `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
        )
    raise ModelError(f"{directory} has no model.safetensors and no model.safetensors.index.json")
