"""Writes pages of images into the pool: on a CPU by copying, on a GPU through pinned memory.

A writer belongs to one thread. Knows bytes and pages; not whose they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from server.memory.image_file import Array


class PageWriter(Protocol):
    """Where the bytes of a page go; contents are [page bytes] uint8."""

    def read(self, page: int, fill: Callable[[Array], None]) -> None:
        """Let `fill` produce the page's content in memory of the writer's choice; returns then."""

    def write(self, page: int, content: Array) -> None:
        """Begin to copy `content`, which has to stay as it is until `wait`."""

    def wait(self) -> None:
        """Return when nothing that was begun still reads a content or writes a page."""


class HostPageWriter:
    """Into a pool in host memory, with numpy alone: it copies without the GIL and without torch.

    A torch operation in a loader's thread would bring an OpenMP team of its own into being, and
    with more threads than cores OpenMP puts the step's own team to sleep after each parallel
    region: every step would take 1.5 times as long from then on.
    """

    def __init__(self, storage: Tensor) -> None:
        self._pages: Array = storage.view(torch.uint8).numpy()

    def read(self, page: int, fill: Callable[[Array], None]) -> None:
        fill(self._pages[page])  # in place: the bytes are moved once

    def write(self, page: int, content: Array) -> None:
        np.copyto(self._pages[page], content)

    def wait(self) -> None:
        """Copies have ended when `write` returns."""


class CudaPageWriter:
    """Into a pool on a GPU, on a stream of its own beside that of the steps.

    Contents given to `write` are pinned, or the copy is not asynchronous.
    """

    def __init__(self, storage: Tensor) -> None:
        self._pages = storage.view(torch.uint8)
        self._stream = torch.cuda.Stream(storage.device)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._staging = pinned_pages(1, self._pages.shape[1])[0]

    def read(self, page: int, fill: Callable[[Array], None]) -> None:
        fill(self._staging)
        self.write(page, self._staging)
        self.wait()

    def write(self, page: int, content: Array) -> None:
        with torch.cuda.stream(self._stream):
            self._pages[page].copy_(torch.from_numpy(content), non_blocking=True)

    def wait(self) -> None:
        self._end.record(self._stream)
        self._end.synchronize()


def page_writer(storage: Tensor) -> PageWriter:
    """What writes into `storage` [num_pages, page_elements], for the thread that calls."""
    return CudaPageWriter(storage) if storage.is_cuda else HostPageWriter(storage)


def host_pages(num_pages: int, page_bytes: int) -> Array:
    """Memory for contents, [num_pages, page_bytes] uint8; taken when it is first written."""
    return np.empty((num_pages, page_bytes), np.uint8)


def pinned_pages(num_pages: int, page_bytes: int) -> Array:
    """The same in pinned memory, from which a GPU copies by itself; taken at once."""
    pinned = torch.empty(num_pages, page_bytes, dtype=torch.uint8, pin_memory=True)
    content: Array = pinned.numpy()
    return content
