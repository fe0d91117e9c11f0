"""Brings packed adapter images into pages, from disk or from host memory, in threads of its own."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from server.memory.byte_rate import ByteRate
from server.memory.host_images import HostImages
from server.memory.image_file import ImageError as ImageError
from server.memory.image_file import ImageFile
from server.memory.image_file import ImageSize as ImageSize
from server.memory.image_file import RankTable as RankTable
from server.memory.page_writer import host_pages, page_writer, pinned_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from adapters_store.layout import BaseLayout
    from server.memory.host_images import HostImage
    from server.memory.page_writer import PageWriter
    from server.memory.residency import AdapterImage

TIMEOUT_SECONDS = 60.0
"""How long a load may take, waiting for a thread included, unless it is set."""

CLOSE_SECONDS = 5.0
"""How long `close` waits for a read that does not return."""

logger = logging.getLogger(__name__)


class LoadCancelled(ImageError):
    """The load was ended because it was cancelled; its pages are written no more."""


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
        """Copy the image's pages to `pages` of the pool, later; then call `finish`, once.

        A page may be written until `finish` is called, and not after. A digest is not started
        again before that.
        """
        ...

    def cancel(self, digest: str) -> None:
        """Ask for an early end: its `finish` gets LoadCancelled, or what it got just before."""
        ...

    @property
    def host(self) -> HostImages:
        """The images that a load would not have to read."""
        ...

    def close(self) -> None:
        """End the copies in progress and forget the others; nothing is finished afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """What loads may take of the machine."""

    num_threads: int = 2  # loads at once; with one, a read that hangs would stop all others
    host_bytes: int = 0  # of images kept in host memory
    bytes_per_second: int | None = None  # into pages, all loads together
    timeout_seconds: float = TIMEOUT_SECONDS


@dataclass(slots=True, eq=False)
class _Load:
    image: AdapterImage
    pages: tuple[int, ...]
    finish: Callable[[RankTable | ImageError], None]
    is_claimed: bool = False  # by the thread that begins it, or by who cancels it before that
    is_cancelled: threading.Event = field(default_factory=threading.Event)


class ThreadedImageLoader:
    """Copies images in a few threads, page by page, while the engine's thread runs steps.

    A load looks for a cancel before each page, and waits there for its share of the bytes a
    second. The pages of an image are in the order of the layers.
    """

    def __init__(
        self, storage: Tensor, layout: BaseLayout, limits: LoadLimits | None = None
    ) -> None:
        """`storage` [num_pages, page_elements] in the layout's dtype is written, never read."""
        limits = limits or LoadLimits()
        self._layout = layout
        self._page_bytes = layout.page_elements * storage.element_size()
        allocate = pinned_pages if storage.is_cuda else host_pages
        self.host = HostImages(limits.host_bytes, self._page_bytes, allocate=allocate)
        self._rate = ByteRate(limits.bytes_per_second) if limits.bytes_per_second else None
        self._loads: dict[str, _Load] = {}  # by digest: those that have not ended
        self._queue: SimpleQueue[_Load | None] = SimpleQueue()
        self._lock = threading.Lock()  # of the claims, _loads and _is_closed
        self._is_closed = False
        # As daemons, so that a read that hangs does not keep the process from ending.
        self._threads = [
            threading.Thread(
                target=self._run, args=(page_writer(storage),), name="adapter-load", daemon=True
            )
            for _ in range(limits.num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def measure(self, image: AdapterImage) -> ImageSize:
        with ImageFile(image, self._layout) as file:
            return file.size

    def start(
        self,
        image: AdapterImage,
        pages: Sequence[int],
        finish: Callable[[RankTable | ImageError], None],
    ) -> None:
        load = _Load(image, tuple(pages), finish)
        with self._lock:
            assert image.digest not in self._loads, "a digest is loaded once at a time"
            self._loads[image.digest] = load
        self._queue.put(load)

    def cancel(self, digest: str) -> None:
        with self._lock:
            load = self._loads.get(digest)
        if load is None:
            return
        load.is_cancelled.set()
        if self._claim(load):
            self._end(load, _cancelled(load))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            loads = list(self._loads.values())
        for load in loads:
            load.is_cancelled.set()
            self._claim(load)  # so that no thread begins it
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    def _run(self, writer: PageWriter) -> None:
        while (load := self._queue.get()) is not None:
            if self._claim(load):
                self._end(load, self._outcome(load, writer))

    def _claim(self, load: _Load) -> bool:
        with self._lock:
            is_first, load.is_claimed = not load.is_claimed, True
            return is_first

    def _end(self, load: _Load, outcome: RankTable | ImageError) -> None:
        with self._lock:
            del self._loads[load.image.digest]
            if self._is_closed:
                return
        load.finish(outcome)

    def _outcome(self, load: _Load, writer: PageWriter) -> RankTable | ImageError:
        digest = load.image.digest
        try:
            if (kept := self.host.hold(digest)) is not None:
                return self._copy(load, kept, writer)
            with ImageFile(load.image, self._layout) as file:
                return self._read(load, file, writer)
        except ImageError as error:
            return error
        except Exception as error:  # the thread goes on to other loads
            logger.exception("the load of adapter %s failed", digest)
            return ImageError(
                f"adapter {digest}: its image cannot be loaded ({type(error).__name__}): "
                "the server's log has the reason"
            )

    def _copy(self, load: _Load, kept: HostImage, writer: PageWriter) -> RankTable:
        """From host memory."""
        try:
            for page, content in zip(load.pages, kept.pages, strict=True):
                self._pause(load)
                writer.write(page, content)
        finally:
            writer.wait()
            self.host.let_go(kept, complete=True)
        return kept.table

    def _read(self, load: _Load, file: ImageFile, writer: PageWriter) -> RankTable:
        """From disk, and into host memory on the way where that has room."""
        table = file.read_table()
        if (num_pages := file.size.num_pages) != len(load.pages):
            raise ImageError(
                f"adapter {load.image.digest}: its image has {num_pages} pages now, "
                f"{len(load.pages)} before: upload the adapter again"
            )
        kept = self.host.reserve(load.image.digest, table, num_pages)
        if kept is None:
            for i, page in enumerate(load.pages):
                self._pause(load)
                writer.read(page, partial(file.read_page, i))
            return table
        is_complete = False
        try:
            for i, (page, content) in enumerate(zip(load.pages, kept.pages, strict=True)):
                self._pause(load)
                file.read_page(i, content)
                writer.write(page, content)
            is_complete = True
        finally:
            writer.wait()
            self.host.let_go(kept, complete=is_complete)
        return table

    def _pause(self, load: _Load) -> None:
        """Wait until the next page may be moved. Raises LoadCancelled."""
        seconds = self._rate.reserve(self._page_bytes) if self._rate is not None else 0.0
        if load.is_cancelled.wait(seconds):
            raise _cancelled(load)


def _cancelled(load: _Load) -> LoadCancelled:
    return LoadCancelled(f"adapter {load.image.digest}: its load was cancelled")
