"""Reads packed adapter images and copies them into pages, in a thread of its own.

An image is a safetensors file: `pages` [n, page_elements] in the pool's dtype, `row_ptr`
[num_layers * num_targets + 1] int32, `row_offset` [rows] int64, which counts elements from the
image's first page, `row_scale` [rows] fp32; its metadata name the adapter ("digest") and the
layout that it was packed for ("layout").
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.layout import ROW_ALIGNMENT, row_elements

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adapters_store.layout import BaseLayout
    from server.memory.residency import AdapterImage

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ImageError(Exception):
    """An image that cannot become resident; the message is fit for the client."""


class ImageSize(NamedTuple):
    """What an image takes of the pool."""

    num_pages: int
    num_rows: int


class RankTable(NamedTuple):
    """One adapter's share of `kernels.layout.RankRows`, on the host, offsets within the image."""

    row_ptr: Tensor  # [num_layers * num_targets + 1] int32
    row_offset: Tensor  # [rows] int64
    row_scale: Tensor  # [rows] fp32


class ImageLoader(Protocol):
    """How the adapter pool gets at images; a test finishes the loads of its own by hand."""

    def measure(self, image: AdapterImage) -> ImageSize:
        """Look at the file's header only. Raises ImageError."""
        ...

    def start(
        self,
        image: AdapterImage,
        pages: Sequence[int],
        finish: Callable[[RankTable | ImageError], None],
    ) -> None:
        """Copy the image's pages to `pages` of the pool, later; then call `finish`, once."""
        ...

    def close(self) -> None:
        """Wait for the copy in progress and forget the others."""
        ...


class ThreadedImageLoader:
    """Copies one image after the other in one thread, while the engine's thread runs steps.

    On a CPU that thread computes with numpy alone. A torch operation in it would bring an OpenMP
    team of its own into being, and with more threads than cores OpenMP puts the step's own team to
    sleep after each parallel region: every step would take 1.5 times as long from then on.
    """

    def __init__(self, storage: Tensor, layout: BaseLayout) -> None:
        """`storage` [num_pages, page_elements] in the layout's dtype is written, never read."""
        self._storage = storage
        self._layout = layout
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-load")

    def measure(self, image: AdapterImage) -> ImageSize:
        try:
            with safe_open(image.path, framework="numpy") as file:
                metadata = file.metadata() or {}
                pages = file.get_slice("pages")
                shape, dtype = pages.get_shape(), pages.get_dtype()
                (num_rows,) = file.get_slice("row_offset").get_shape()
        except (OSError, SafetensorError, ValueError) as error:
            raise self._unreadable(image, error) from error
        self._check_identity(image, metadata)
        wanted = _DTYPE_NAMES[self._layout.dtype]
        if len(shape) != 2 or shape[1] != self._layout.page_elements or dtype != wanted:
            raise ImageError(
                f"adapter {image.digest}: its image holds pages of shape {shape} in {dtype}, "
                f"not [n, {self._layout.page_elements}] in {wanted}: upload the adapter again"
            )
        return ImageSize(shape[0], num_rows)

    def start(
        self,
        image: AdapterImage,
        pages: Sequence[int],
        finish: Callable[[RankTable | ImageError], None],
    ) -> None:
        def report(future: Future[RankTable]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                finish(future.result())
            elif isinstance(error, ImageError):
                finish(error)
            else:
                finish(self._unreadable(image, error))

        self._executor.submit(self._load, image, tuple(pages)).add_done_callback(report)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, image: AdapterImage, pages: tuple[int, ...]) -> RankTable:
        with safe_open(image.path, framework="pt") as file:
            self._check_identity(image, file.metadata() or {})
            source = file.get_tensor("pages")
            # The file may go away while the table is in use: keep copies of the small tensors.
            names = ("row_ptr", "row_offset", "row_scale")
            ptr, offset, scale = (file.get_tensor(name).numpy().copy() for name in names)
            self._check_table(image, ptr, offset, scale, num_pages=len(pages))
            if len(source) != len(pages):
                raise ImageError(
                    f"adapter {image.digest}: its image has {len(source)} pages now, "
                    f"{len(pages)} before: upload the adapter again"
                )
            if self._storage.is_cuda:
                self._copy_to_device(source, pages)
            else:
                self._copy_on_host(source, pages)
        return RankTable(*(torch.from_numpy(part) for part in (ptr, offset, scale)))

    def _copy_on_host(self, source: Tensor, pages: tuple[int, ...]) -> None:
        # numpy copies without the GIL.
        from_bytes = source.view(torch.uint8).numpy()
        to_bytes = self._storage.view(torch.uint8).numpy()
        for i, page in enumerate(pages):
            np.copyto(to_bytes[page], from_bytes[i])

    def _copy_to_device(self, source: Tensor, pages: tuple[int, ...]) -> None:
        stream = torch.cuda.Stream(self._storage.device)  # type: ignore[no-untyped-call]
        pinned = source.pin_memory()
        with torch.cuda.stream(stream):
            for i, page in enumerate(pages):
                self._storage[page].copy_(pinned[i], non_blocking=True)
        stream.synchronize()

    def _check_identity(self, image: AdapterImage, metadata: dict[str, str]) -> None:
        found = metadata.get("digest")
        if found != image.digest:
            raise ImageError(
                f"adapter {image.digest}: its image is that of {found}: upload the adapter again"
            )
        key = metadata.get("layout")
        if key != self._layout.key:
            raise ImageError(
                f"adapter {image.digest}: packed for layout {key}, but the server runs "
                f"{self._layout.model_name} with layout {self._layout.key}: upload it again"
            )

    def _check_table(
        self,
        image: AdapterImage,
        ptr: np.ndarray[Any, Any],
        offset: np.ndarray[Any, Any],
        scale: np.ndarray[Any, Any],
        num_pages: int,
    ) -> None:
        num_entries = self._layout.num_layers * len(self._layout.targets) + 1
        page_elements = self._layout.page_elements
        sound = (
            (ptr.dtype, offset.dtype, scale.dtype) == (np.int32, np.int64, np.float32)
            and ptr.shape == (num_entries,)
            and offset.ndim == 1
            and offset.shape == scale.shape
            and (int(ptr[0]), int(ptr[-1])) == (0, len(offset))
            and bool((np.diff(ptr) >= 0).all())
            and bool(((offset >= 0) & (offset < num_pages * page_elements)).all())
            and bool((offset % ROW_ALIGNMENT == 0).all())
            and bool((offset % page_elements + self._row_sizes(ptr) <= page_elements).all())
        )
        if not sound:
            raise ImageError(
                f"adapter {image.digest}: the row table of its image does not fit "
                f"{num_entries - 1} targets and {num_pages} pages: upload the adapter again"
            )

    def _row_sizes(self, ptr: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Elements of each rank row, [rows]."""
        sizes = [row_elements(t.in_features, t.out_features) for t in self._layout.targets]
        return np.repeat(sizes * self._layout.num_layers, np.diff(ptr))

    def _unreadable(self, image: AdapterImage, error: BaseException) -> ImageError:
        # An OSError's own text would tell the client a path of the server.
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif isinstance(error, SafetensorError):
            reason = str(error)
        else:
            reason = type(error).__name__
        return ImageError(
            f"adapter {image.digest}: its image cannot be read ({reason}): upload the adapter again"
        )
