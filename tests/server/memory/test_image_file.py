"""Images as files: what is read, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from server.memory.image_file import MAX_HEADER_BYTES, ImageError, ImageFile
from server.memory.residency import AdapterImage


@pytest.fixture
def open_image(layout):
    """open_image(image): the file, closed after the test."""
    files = []

    def open_(image) -> ImageFile:
        files.append(ImageFile(image, layout))
        return files[-1]

    yield open_
    for file in files:
        file.close()


def page_of(file, index: int, page_elements: int) -> torch.Tensor:
    content = np.full(page_elements * 4, 7, np.uint8)
    file.read_page(index, content)
    return torch.from_numpy(content).view(torch.float32)


def test_tells_pages_and_rows(open_image, write_image):
    assert open_image(write_image(num_rows=6)).size == (2, 6)


def test_reads_each_page_and_the_row_table_as_written(open_image, write_image, layout):
    file = open_image(write_image(num_rows=12, seed=3))
    expected = torch.randn(3, layout.page_elements, generator=torch.Generator().manual_seed(3))
    for i in (2, 0, 1):
        assert torch.equal(page_of(file, i, layout.page_elements), expected[i])
    table = file.read_table()
    assert table.row_ptr.tolist() == [0] + [12] * 14
    assert table.row_offset.tolist() == [16 * i for i in range(12)]
    assert table.row_scale.tolist() == [2.0] * 12


def test_reads_pages_in_sixteen_bits(write_image, layout):
    layout = dataclasses.replace(layout, dtype="bfloat16")
    values = torch.randn(2, layout.page_elements).bfloat16()
    image = write_image(num_rows=8, pages=values, stored_layout=layout.key)
    content = np.empty(layout.page_elements * 2, np.uint8)
    with ImageFile(image, layout) as file:
        file.read_page(1, content)
    assert torch.equal(torch.from_numpy(content).view(torch.bfloat16), values[1])


def test_an_image_without_rows_is_sound(open_image, write_image):
    file = open_image(write_image(num_rows=0))
    assert file.size == (0, 0)
    assert file.read_table().row_offset.shape == (0,)


def test_a_missing_file_is_said_to_be_missing_without_telling_its_path(open_image, tmp_path):
    with pytest.raises(ImageError, match="no such file") as caught:
        open_image(AdapterImage(digest="d1", path=str(tmp_path / "gone")))
    assert str(tmp_path) not in str(caught.value)
    assert "upload" in str(caught.value)


def test_a_directory_in_its_place_is_refused(open_image, tmp_path):
    with pytest.raises(ImageError, match="IsADirectoryError"):
        open_image(AdapterImage(digest="d1", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"stored_digest": "other"}, "its image is that of other", id="digest"),
        pytest.param({"stored_layout": "0123"}, "packed for layout 0123", id="layout"),
        pytest.param({"pages": torch.zeros(2, 32)}, r"shape \[2, 32\]", id="page size"),
        pytest.param({"pages": torch.zeros(128)}, r"shape \[128\]", id="dimensions"),
        pytest.param({"pages": torch.zeros(2, 64).half()}, "in F16", id="dtype"),
        pytest.param({"row_offset": None}, "cannot be read.*row_offset", id="missing tensor"),
    ],
)
def test_refuses_by_the_header_what_is_not_the_image_asked_for(
    open_image, write_image, changes, message
):
    with pytest.raises(ImageError, match=message):
        open_image(write_image(**changes))


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, 900, -1])
def test_refuses_a_truncated_file_wherever_it_was_cut(open_image, write_image, num_bytes):
    image = write_image()
    path = Path(image.path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(image)


def test_a_file_that_is_cut_off_while_it_is_open_is_an_error_of_the_read(
    open_image, write_image, layout
):
    image = write_image(num_rows=12)
    file = open_image(image)
    os.truncate(image.path, Path(image.path).stat().st_size - 300)
    page_of(file, 0, layout.page_elements)
    with pytest.raises(ImageError, match="the file ends at byte"):
        page_of(file, 2, layout.page_elements)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        pytest.param((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "header would have", id="huge"),
        pytest.param((4).to_bytes(8, "little") + b"{}{}", "cannot be read", id="not JSON"),
        pytest.param((2).to_bytes(8, "little") + b"[]", "cannot be read", id="not an object"),
    ],
)
def test_refuses_a_header_that_is_none(open_image, tmp_path, header, message):
    path = tmp_path / "image"
    path.write_bytes(header)
    with pytest.raises(ImageError, match=message):
        open_image(AdapterImage(digest="d1", path=str(path)))


def test_refuses_offsets_that_are_not_those_of_the_shape(open_image, write_image):
    image = write_image()
    path = Path(image.path)
    content = path.read_bytes()
    begin = content.index(b'"data_offsets":[', content.index(b'"pages"')) + len(b'"data_offsets":[')
    changed = content[:begin] + b"9" + content[begin + 1 :]
    path.write_bytes(changed)
    with pytest.raises(ImageError, match="its pages have"):
        open_image(image)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 48, 64, 128])}, id="past the end"),
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 48, 64, -16])}, id="negative"),
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 56, 64, 80])}, id="straddles a page"),
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 44, 64, 80])}, id="unaligned"),
        pytest.param({"row_offset": torch.zeros(6, 1, dtype=torch.int64)}, id="two dimensions"),
        pytest.param({"row_ptr": torch.full((15,), 6, dtype=torch.int32)}, id="first not 0"),
        pytest.param({"row_ptr": torch.zeros(14, dtype=torch.int32)}, id="too short"),
        pytest.param({"row_ptr": torch.zeros(15, dtype=torch.int64)}, id="ptr dtype"),
        pytest.param({"row_scale": torch.ones(5)}, id="scales missing"),
        pytest.param({"row_scale": torch.ones(6).double()}, id="scale dtype"),
    ],
)
def test_refuses_a_row_table_that_would_read_elsewhere(open_image, write_image, changes):
    file = open_image(write_image(**changes))
    with pytest.raises(ImageError, match="row table of its image does not fit 14 targets"):
        file.read_table()
