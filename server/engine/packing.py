"""Arrays of one step packed in one buffer, so that a single copy brings them to the device.

Knows names, dtypes and shapes; not what the arrays mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    Array = np.ndarray[Any, Any]

ALIGNMENT = 16
"""Bytes to which every array is aligned. Triton compiles a kernel anew for a pointer that is not a
multiple of 16, so that an array may never lie otherwise in one step than in the next."""

_TORCH_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Field(NamedTuple):
    """One array of a packing."""

    dtype: str  # "int32", "int64", "float32" or "float64"
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Packing:
    """Where each of some named arrays lies in a buffer of `num_bytes` bytes."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = dict(fields)
        self._spans: dict[str, slice] = {}
        start = 0
        for name, field in fields.items():
            self._spans[name] = slice(start, start + field.num_bytes)
            start += -(-field.num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = start

    def arrays(self, buffer: Array) -> dict[str, Array]:
        """The fields as views of `buffer` [num_bytes] uint8."""
        return {
            name: buffer[self._spans[name]].view(field.dtype).reshape(field.shape)
            for name, field in self._fields.items()
        }

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """The fields as views of `buffer` [num_bytes] uint8, on its device."""
        return {
            name: buffer[self._spans[name]].view(_TORCH_DTYPES[field.dtype]).view(field.shape)
            for name, field in self._fields.items()
        }


def staging_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes on the host that are about to be copied to `device`, [num_bytes] uint8.

    Pinned for a GPU, so that the copy may run while the host goes on. The buffer may be dropped as
    soon as the copy was asked for: torch gives pinned memory to nobody else before the copies out
    of it have ended. Ask for a new one each step; the same memory comes back without a system call.
    """
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """The arrays, each int32, int64, float32 or float64, as tensors on `device`, in one copy.

    The host does not wait for it. On a CPU nothing is copied: the tensors are the arrays.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    packing = Packing({name: Field(a.dtype.name, a.shape) for name, a in arrays.items()})
    buffer = staging_buffer(packing.num_bytes, device)
    for name, place in packing.arrays(buffer.numpy()).items():
        place[...] = arrays[name]
    return packing.tensors(buffer.to(device, non_blocking=True))
