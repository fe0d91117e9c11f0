"""The header of a safetensors file, parsed strictly from its raw bytes.

The format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes.
Nothing is allocated from a number in the file before that number was checked.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters_store.errors import FileRefused
from adapters_store.number_formats import STORED_AS
from adapters_store.report import Problem
from adapters_store.strict_json import parse_object

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 1 << 20
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}")
_REMEDY = "write the file again with PEFT's save_pretrained and upload it whole"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file."""

    name: str
    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    begin: int  # first byte, from the start of the file
    end: int


def read_header(path: Path, max_tensors: int) -> list[TensorEntry]:
    """The tensors in the order of their bytes; FileRefused where anything is out of order.

    Checks lengths against the file's size, that no key is given twice, key grammar, the types,
    and that the tensors' bytes follow one another without a gap or overlap up to the end.
    """
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        header, data_start = _read_json(file, file_bytes)
    header.pop("__metadata__", None)
    if len(header) > max_tensors:
        raise _refused(
            "too_many_tensors",
            f"the file has {len(header)} tensors, an adapter of this base at most {max_tensors}",
            "upload an adapter of this base",
        )
    entries = [_entry(name, value, data_start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_contiguous(entries, data_start, file_bytes)
    return entries


def _read_json(file: BinaryIO, file_bytes: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise _broken(f"the file has only {file_bytes} bytes, it is cut off or empty")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(f"its header would have {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length > file_bytes - LENGTH_BYTES:
        raise _broken(f"its header has {length} bytes, the file {file_bytes}: it is cut off")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _broken("its header does not begin with '{'")
    try:
        header = parse_object(raw)
    except ValueError as error:
        raise _broken(f"its header is not valid: {str(error)[:200]}") from error
    return header, LENGTH_BYTES + length


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    shown = repr(name[:120])
    if not _KEY.fullmatch(name):
        raise _broken(f"the tensor name {shown} has other characters than letters, digits, '._-'")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(f"the entry of {shown} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_AS:
        raise _refused(
            "unsupported_dtype",
            f"{WEIGHTS_FILE}: {shown} has the type {str(dtype)[:20]!r}, "
            f"served are {', '.join(STORED_AS)}",
            "convert the adapter to bfloat16, float16 or float32 before saving",
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _broken(f"the shape of {shown} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(f"the data_offsets of {shown} are not two positions")
    begin, end = offsets
    num_bytes = math.prod(shape) * STORED_AS[dtype].itemsize
    if end - begin != num_bytes:
        raise _broken(f"{shown} has {end - begin} bytes where its shape needs {num_bytes}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_contiguous(entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    position = data_start
    for entry in entries:
        if entry.begin != position:
            raise _broken(
                f"{entry.name!r} begins at byte {entry.begin}, the tensor before it ends at "
                f"{position}"
            )
        position = entry.end
    if position != file_bytes:
        raise _broken(f"its tensors end at byte {position}, the file has {file_bytes}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 48 for value in values
    )


def _broken(message: str) -> FileRefused:
    return _refused("broken_weights", f"{WEIGHTS_FILE} is not a sound file: {message}", _REMEDY)


def _refused(code: str, message: str, remedy: str) -> FileRefused:
    return FileRefused(Problem(code, message, remedy))
