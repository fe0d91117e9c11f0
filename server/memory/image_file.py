"""A packed adapter image as a file: its header, its row table, one page after the other.

An image is a safetensors file: `pages` [n, page_elements] in the pool's dtype, `row_ptr`
[num_layers * num_targets + 1] int32, `row_offset` [rows] int64, which counts elements from the
image's first page, `row_scale` [rows] fp32; its metadata name the adapter ("digest") and the
layout that it was packed for ("layout").
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec
import numpy as np
import torch
from torch import Tensor

from kernels.layout import ROW_ALIGNMENT, row_elements

if TYPE_CHECKING:
    from adapters_store.layout import BaseLayout
    from server.memory.residency import AdapterImage

Array = np.ndarray[Any, Any]

MAX_HEADER_BYTES = 1 << 20
_LENGTH_BYTES = 8
_PAGE_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
_TABLE_DTYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32}


class ImageError(Exception):
    """An image that cannot become resident; the message is fit for the client."""


class ImageSize(NamedTuple):
    """What an image takes of the pool."""

    num_pages: int
    num_rows: int


class RankTable(NamedTuple):
    """One adapter's share of `kernels.layout.RankRows`, on the host.

    Offsets are within the image, until its pages lie in the pool and they are located there.
    """

    row_ptr: Tensor  # [num_layers * num_targets + 1] int32
    row_offset: Tensor  # [rows] int64
    row_scale: Tensor  # [rows] fp32


class _Stored(msgspec.Struct, frozen=True):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # first byte and the one behind the last, after the header


class _Header(msgspec.Struct, frozen=True):
    pages: _Stored
    row_ptr: _Stored
    row_offset: _Stored
    row_scale: _Stored
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


class ImageFile:
    """An image that is open and whose header was found to be that of the adapter asked for.

    Reads with plain reads instead of mapping the file, so that one that is cut off meanwhile is an
    error and not the end of the process. Computes without torch, for the threads that load.
    """

    def __init__(self, image: AdapterImage, layout: BaseLayout) -> None:
        """Open it and read its header. Raises ImageError."""
        self._image = image
        self._layout = layout
        try:
            self._fd = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._header, self._data_start = self._read_header()
            self.size = self._check_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def read_page(self, index: int, out: Array) -> None:
        """Read page `index` of the image into `out` [page bytes] uint8. Raises ImageError."""
        first = self._data_start + self._header.pages.data_offsets[0]
        self._read(first + index * out.nbytes, out)

    def read_table(self) -> RankTable:
        """The row table, every row within the image's pages. Raises ImageError."""
        header = self._header
        stored = (header.row_ptr, header.row_offset, header.row_scale)
        parts = [array for part in stored if (array := self._array(part)) is not None]
        if len(parts) < len(stored) or not self._is_sound(*parts):
            num_targets = self._layout.num_layers * len(self._layout.targets)
            raise ImageError(
                f"adapter {self._image.digest}: the row table of its image does not fit "
                f"{num_targets} targets and {self.size.num_pages} pages: upload the adapter again"
            )
        return RankTable(*(torch.from_numpy(part) for part in parts))

    def _read_header(self) -> tuple[_Header, int]:
        prefix = np.empty(_LENGTH_BYTES, np.uint8)
        self._read(0, prefix)
        length = int.from_bytes(prefix.tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise self._broken(f"its header would have {length} bytes of {MAX_HEADER_BYTES}")
        raw = np.empty(length, np.uint8)
        self._read(_LENGTH_BYTES, raw)
        try:
            header = msgspec.json.decode(raw.tobytes(), type=_Header)
        except msgspec.MsgspecError as error:
            raise self._broken(str(error)) from error
        return header, _LENGTH_BYTES + length

    def _check_header(self) -> ImageSize:
        header, layout = self._header, self._layout
        self._check_identity(header.metadata)
        shape, (wanted, item_bytes) = list(header.pages.shape), _PAGE_DTYPES[layout.dtype]
        is_whole = len(shape) == 2 and shape[1] == layout.page_elements
        if not is_whole or header.pages.dtype != wanted:
            raise ImageError(
                f"adapter {self._image.digest}: its image holds pages of shape {shape} in "
                f"{header.pages.dtype}, not [n, {layout.page_elements}] in {wanted}: "
                "upload the adapter again"
            )
        begin, end = header.pages.data_offsets
        num_bytes = math.prod(shape) * item_bytes
        if begin < 0 or end - begin != num_bytes:
            raise self._broken(f"its pages have {end - begin} bytes instead of {num_bytes}")
        stored = (header.pages, header.row_ptr, header.row_offset, header.row_scale)
        last = self._data_start + max(part.data_offsets[1] for part in stored)
        if (has := os.fstat(self._fd).st_size) < last:
            raise self._broken(f"the file is cut off at byte {has} of {last}")
        return ImageSize(shape[0], math.prod(header.row_offset.shape))

    def _check_identity(self, metadata: dict[str, str]) -> None:
        digest, found, key = self._image.digest, metadata.get("digest"), metadata.get("layout")
        if found != digest:
            raise ImageError(
                f"adapter {digest}: its image is that of {found}: upload the adapter again"
            )
        if key != self._layout.key:
            raise ImageError(
                f"adapter {digest}: packed for layout {key}, but the server runs "
                f"{self._layout.model_name} with layout {self._layout.key}: upload it again"
            )

    def _array(self, stored: _Stored) -> Array | None:
        """A tensor of the row table; None where its bytes are not what its shape needs."""
        dtype, (begin, end) = _TABLE_DTYPES.get(stored.dtype), stored.data_offsets
        if dtype is None or len(stored.shape) != 1 or begin < 0:
            return None
        if end - begin != math.prod(stored.shape) * np.dtype(dtype).itemsize:
            return None
        array: Array = np.empty(stored.shape, dtype)
        self._read(self._data_start + begin, array.view(np.uint8))
        return array

    def _is_sound(self, ptr: Array, offset: Array, scale: Array) -> bool:
        num_entries = self._layout.num_layers * len(self._layout.targets) + 1
        page_elements = self._layout.page_elements
        return (
            (ptr.dtype, offset.dtype, scale.dtype) == (np.int32, np.int64, np.float32)
            and ptr.shape == (num_entries,)
            and offset.shape == scale.shape
            and (int(ptr[0]), int(ptr[-1])) == (0, len(offset))
            and bool((np.diff(ptr) >= 0).all())
            and bool(((offset >= 0) & (offset < self.size.num_pages * page_elements)).all())
            and bool((offset % ROW_ALIGNMENT == 0).all())
            and bool((offset % page_elements + self._row_sizes(ptr) <= page_elements).all())
        )

    def _row_sizes(self, ptr: Array) -> Array:
        """Elements of each rank row, [rows]."""
        sizes = [row_elements(t.in_features, t.out_features) for t in self._layout.targets]
        return np.repeat(sizes * self._layout.num_layers, np.diff(ptr))

    def _read(self, position: int, out: Array) -> None:
        """Fill `out` uint8 with the bytes from `position` on."""
        rest = out.data
        while rest:
            try:
                num_read = os.preadv(self._fd, [rest], position)  # without the GIL
            except OSError as error:
                raise self._unreadable(error) from error
            if num_read == 0:
                raise self._broken(f"the file ends at byte {position}")
            rest, position = rest[num_read:], position + num_read

    def _unreadable(self, error: OSError) -> ImageError:
        # An OSError's own text would tell the client a path of the server.
        is_missing = isinstance(error, FileNotFoundError)
        return self._broken("there is no such file" if is_missing else type(error).__name__)

    def _broken(self, reason: str) -> ImageError:
        return ImageError(
            f"adapter {self._image.digest}: its image cannot be read ({reason}): "
            "upload the adapter again"
        )
