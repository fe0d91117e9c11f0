"""The header of a GGUF file: its metadata, and where each tensor lies.

Reads versions 2 and 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md),
and steps over the vocabulary, which is most of a header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""struct's letter for each value type that has a fixed size."""

_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file, and in which form."""

    shape: tuple[int, ...]  # slowest dimension first, as in torch
    kind: int  # a ggml type: how its elements are stored
    offset: int  # of its first byte in the file


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the tensors' bytes."""

    metadata: dict[str, Any]  # an array of strings is None
    tensors: dict[str, StoredTensor]  # under the names in the file


def read_header(data: memoryview) -> GgufHeader:
    """Read the header of a whole file's bytes.

    Raises ValueError or struct.error where they are not GGUF, end too early, or name a key or a
    tensor twice.
    """
    return _Reader(data).header()


class _Reader:
    """A position in the bytes, moved on by each read."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if bytes(self._data[:4]) != MAGIC:
            raise ValueError(f"it begins with {bytes(self._data[:4])!r}, not with {MAGIC!r}")
        self._at = 4
        version = self._one("I")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}; supported are {VERSIONS}, little-endian")
        num_tensors, num_keys = self._one("Q"), self._one("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise ValueError(f"it has the key {key} twice")
            metadata[key] = self._value(self._one("I"))
        return GgufHeader(metadata, self._tensors(num_tensors, metadata))

    def _tensors(self, num_tensors: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"its alignment is {alignment!r}, not a multiple of 8")
        found: dict[str, StoredTensor] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in found:
                raise ValueError(f"it has the tensor {name} twice")
            num_dimensions = self._one("I")
            if num_dimensions > MAX_DIMENSIONS:
                raise ValueError(f"{name} has {num_dimensions} dimensions, not {MAX_DIMENSIONS}")
            shape = tuple(self._one("Q") for _ in range(num_dimensions))
            found[name] = StoredTensor(shape[::-1], self._one("I"), self._one("Q"))
        start = -(-self._at // alignment) * alignment
        return {
            name: StoredTensor(tensor.shape, tensor.kind, start + tensor.offset)
            for name, tensor in found.items()
        }

    def _one(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self._at)
        self._at += struct.calcsize(letter)
        return value

    def _string(self) -> str:
        length = self._one("Q")
        text = bytes(self._data[self._at : self._at + length])
        self._at += length
        self._check_end()
        return text.decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._one("I"), self._one("Q"))
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        return self._one(_SCALARS[kind])

    def _array(self, kind: int, length: int) -> list[Any] | None:
        """A list of numbers; None for strings."""
        if kind in _SCALARS:
            form = f"<{length}{_SCALARS[kind]}"
            values = list(struct.unpack_from(form, self._data, self._at))
            self._at += struct.calcsize(form)
            return values
        if kind != _STRING:
            raise ValueError(f"an array has elements of type {kind}")
        data, at, read_length = self._data, self._at, struct.Struct("<Q").unpack_from
        for _ in range(length):
            at += 8 + read_length(data, at)[0]
        self._at = at
        self._check_end()
        return None

    def _check_end(self) -> None:
        if self._at > len(self._data):
            raise ValueError(f"it ends after {len(self._data)} bytes, before its header does")
