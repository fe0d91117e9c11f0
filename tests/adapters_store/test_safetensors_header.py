"""Promises of the header check: sound files are read, everything else is refused, never worse."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import FileRefused
from adapters_store.safetensors_header import MAX_HEADER_BYTES, read_header

steady = settings(deadline=None, derandomize=True, max_examples=60)


def file_of(header, data=b"\0" * 24):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


SOUND = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("header") / "adapter_model.safetensors"


def read(path, content):
    path.write_bytes(content)
    return read_header(path, max_tensors=8)


def test_reads_names_types_shapes_and_places(path):
    content = file_of(SOUND)
    entries = read(path, content)
    assert [(e.name, e.dtype, e.shape) for e in entries] == [
        ("a", "F32", (2, 2)),
        ("b", "BF16", (4,)),
    ]
    assert entries[0].begin == len(content) - 24
    assert entries[1].end == len(content)


def test_reads_what_the_library_writes(path, tensors_to_file):
    tensors = {"x": np.ones((3, 5), np.float16), "y": np.zeros((2, 2), np.uint16)}
    tensors_to_file(path, tensors)
    found = {entry.name: (entry.dtype, entry.shape) for entry in read_header(path, 8)}
    assert found == {"x": ("F16", (3, 5)), "y": ("BF16", (2, 2))}


def test_truncation_at_any_byte_is_refused(path):
    content = file_of(SOUND)
    for length in range(len(content)):
        with pytest.raises(FileRefused):
            read(path, content[:length])


def test_further_bytes_at_the_end_are_refused(path):
    with pytest.raises(FileRefused, match="the file has"):
        read(path, file_of(SOUND) + b"\0")


@steady
@given(st.data())
def test_changed_bytes_are_read_or_refused_and_never_crash(path, data):
    content = bytearray(file_of(SOUND))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = read(path, bytes(content))
    except FileRefused:
        return
    assert sum(entry.end - entry.begin for entry in entries) == 24


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), children)
    ),
    max_leaves=8,
)


@steady
@given(st.dictionaries(st.text(max_size=8), json_values, max_size=3))
def test_any_json_is_read_or_refused_and_never_crashes(path, header):
    try:
        entries = read(path, file_of(header, b""))
    except FileRefused:
        return
    assert all(entry.begin == entry.end for entry in entries)


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "broken_weights"),
        ((1 << 62).to_bytes(8, "little"), "broken_weights"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * 64, "broken_weights"),
        (file_of(b'{"a": 1, "a": 2}'), "broken_weights"),
        (file_of(b" {}"), "broken_weights"),
        (file_of(b"[]"), "broken_weights"),
        (file_of(b'{"a":' * 50_000), "broken_weights"),
        (file_of(entry(dtype="F64", shape=[3])), "unsupported_dtype"),
        (file_of(entry(dtype="I8", shape=[24])), "unsupported_dtype"),
        (file_of(entry(dtype=["F32"])), "unsupported_dtype"),
        (file_of(entry(shape=[2, 4])), "broken_weights"),
        (file_of(entry(shape=[-2, -3])), "broken_weights"),
        (file_of(entry(shape=[2.0, 3])), "broken_weights"),
        (file_of(entry(shape=[True, 6])), "broken_weights"),
        (file_of(entry(shape=[6] + [1] * 8)), "broken_weights"),
        (file_of(entry(data_offsets=[0])), "broken_weights"),
        (file_of(entry(data_offsets=[24, 0])), "broken_weights"),
        (file_of(entry(data_offsets=[8, 32])), "broken_weights"),
        (file_of(entry(extra=1)), "broken_weights"),
        (file_of({"a/../b": entry()["a"]}), "broken_weights"),
        (file_of({"a": entry()["a"], "b": entry()["a"]}), "broken_weights"),
        (file_of({str(i): entry(shape=[0], data_offsets=[0, 0])["a"] for i in range(9)}),
         "too_many_tensors"),
    ],
)  # fmt: skip
def test_refuses_headers_that_are_out_of_order(path, content, code):
    with pytest.raises(FileRefused) as refusal:
        read(path, content)
    assert refusal.value.problem.code == code
