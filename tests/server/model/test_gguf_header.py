"""A GGUF header is read as the gguf package writes it, and what is no header is refused."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from server.model.gguf_header import read_header

SCALARS = {
    "uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 1 << 31,
    "int32": -5, "uint64": 1 << 40, "int64": -(1 << 40), "float32": 0.5, "float64": 0.1,
    "bool": True, "string": "Grüße",
}  # fmt: skip
TENSORS = {"a": np.zeros((3, 5), np.float32), "b": np.arange(7, dtype=np.float16)}


def written(tmp_path, alignment: int | None = None) -> bytes:
    """A file with a value of every type, arrays, and two tensors."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for kind, value in SCALARS.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.strings", ["one", "", "three"])
    writer.add_array("x.numbers", [3, 1, 2])
    writer.add_array("x.fractions", [0.5, -2.0])
    for name, tensor in TENSORS.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "x.gguf").read_bytes()


def test_every_type_of_value_is_read_and_strings_in_arrays_are_not(tmp_path):
    metadata = read_header(memoryview(written(tmp_path))).metadata
    assert {kind: metadata[f"x.{kind}"] for kind in SCALARS} == SCALARS
    assert metadata["x.strings"] is None
    assert metadata["x.numbers"] == [3, 1, 2]
    assert metadata["x.fractions"] == [0.5, -2.0]


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_tensors_lie_where_the_header_says(tmp_path, alignment):
    data = written(tmp_path, alignment)
    tensors = read_header(memoryview(data)).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (3, 5), "b": (7,)}
    for name, expected in TENSORS.items():
        stored = data[tensors[name].offset :][: expected.nbytes]
        assert stored == expected.tobytes()
    assert (tensors["a"].kind, tensors["b"].kind) == (0, 1)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def file_of(*keys: bytes, version: int = 3, num_tensors: int = 0, rest: bytes = b"") -> memoryview:
    counts = struct.pack("<IQQ", version, num_tensors, len(keys))
    return memoryview(b"GGUF" + counts + b"".join(keys) + rest)


NUMBER = key("n", 4, struct.pack("<I", 7))
TENSOR = struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0)


def test_a_smallest_file_is_read():
    header = read_header(file_of(NUMBER, num_tensors=1, rest=TENSOR))
    assert header.metadata == {"n": 7}
    assert header.tensors["t"].shape == (4,)
    assert header.tensors["t"].offset % 32 == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (memoryview(b"PK\3\4" + bytes(60)), "begins with b'PK"),
        (file_of(version=1), "version 1; supported are"),
        (file_of(version=3 << 24), "version 50331648"),
        (file_of(NUMBER, NUMBER), "the key n twice"),
        (file_of(key("n", 99, b"")), "unknown type 99"),
        (file_of(key("n", 9, struct.pack("<IQ", 9, 1))), "elements of type 9"),
        (file_of(key("s", 8, struct.pack("<Q", 1 << 60))), "it ends after"),
        (file_of(key("s", 9, struct.pack("<IQQ", 8, 1, 1 << 60))), "it ends after"),
        (file_of(key("general.alignment", 4, struct.pack("<I", 12))), "alignment is 12"),
        (file_of(num_tensors=2, rest=TENSOR * 2), "the tensor t twice"),
        (file_of(num_tensors=1, rest=struct.pack("<Q1sI", 1, b"t", 9)), "9 dimensions"),
    ],
)
def test_what_is_no_header_is_refused_with_the_reason(data, message):
    with pytest.raises(ValueError, match=message):
        read_header(data)


def test_a_header_cut_anywhere_is_refused(tmp_path):
    data = written(tmp_path)
    end = min(tensor.offset for tensor in read_header(memoryview(data)).tensors.values()) - 32
    for length in range(0, end, 7):
        with pytest.raises((ValueError, struct.error)):
            read_header(memoryview(data[:length]))
