"""Images in host memory, between disk and device: kept by value, within a budget of bytes.

Knows digests and bytes; reads no file and knows nothing of the device.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.memory.idle_heap import IdleHeap
from server.memory.page_writer import host_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.memory.image_file import Array, RankTable

CHUNK_BYTES = 64 << 20
"""Memory is taken in pieces of this size: pinning is slow, and torch rounds up to a power of 2."""

OPEN_BYTES = 1 << 20
"""What could be read in the time that opening a file takes: the smaller the image, the more."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class HostImage:
    """One image in host memory; its content may be used between `hold` and `let_go`."""

    digest: str
    table: RankTable
    pages: list[Array]  # [page bytes] uint8 each
    num_uses: int = 0


class HostImages:
    """Whole images by digest; the least valuable one goes when another needs its pages.

    The value is that of GreedyDual-Size-Frequency (Cherkasova 1998), as on the device: price +
    uses · cost / size, where the cost is that of reading the image again, and the price the value
    of the last victim, so that what is not used any more ages. `max_pages` pages are never
    exceeded; row tables, 12 bytes a row, come on top and are less than a hundredth of it.

    Invariants: a page is free or belongs to one image; one that is held is not evicted. Any thread
    may call any method, and two threads never hold one digest.
    """

    def __init__(
        self,
        max_bytes: int,
        page_bytes: int,
        *,
        allocate: Callable[[int, int], Array] = host_pages,
    ) -> None:
        """`allocate` gives pages [n, page_bytes] uint8. A budget below one page holds nothing."""
        self.num_hits = 0  # of `hold`
        self._page_bytes = page_bytes
        capacity = max_bytes // page_bytes
        self._chunk_pages = max(1, min(capacity, CHUNK_BYTES // page_bytes))
        self._num_chunks = capacity // self._chunk_pages  # that may still be taken
        self._allocate = allocate
        self._num_pages = 0  # that were taken
        self._free: list[Array] = []
        self._images: dict[str, HostImage] = {}  # those that are complete
        self._num_held_pages = 0  # of held images, those that are being read included
        self._idle: IdleHeap[str] = IdleHeap()  # of those, the ones that are not held
        self._price = 0.0
        self._lock = threading.Lock()

    @property
    def max_pages(self) -> int:
        """Pages that all images together can have."""
        return self._num_pages + self._num_chunks * self._chunk_pages

    def num_pages_by_digest(self) -> dict[str, int]:
        """Of the complete images; takes no lock, so that it never waits for a thread that loads."""
        return {digest: len(image.pages) for digest, image in self._images.copy().items()}

    def hold(self, digest: str) -> HostImage | None:
        """The complete image, which stays until `let_go`; None when it has to be read."""
        with self._lock:
            image = self._images.get(digest)
            if image is not None:
                self.num_hits += 1
                self._num_held_pages += len(image.pages)
                self._idle.discard(digest)
            return image

    def reserve(self, digest: str, table: RankTable, num_pages: int) -> HostImage | None:
        """Room for an image that is about to be read, held; None when it cannot be had.

        Evicts what is worth least, and nothing when that would not be enough.
        """
        with self._lock:
            while len(self._free) < num_pages:
                if num_pages > self.max_pages - self._num_held_pages:
                    return None
                if self._num_chunks:
                    self._grow()
                else:
                    self._evict()
            pages = [self._free.pop() for _ in range(num_pages)]
            self._num_held_pages += num_pages
            return HostImage(digest, table, pages)

    def let_go(self, image: HostImage, *, complete: bool) -> None:
        """End a hold: keep the image for later loads, or give its pages back if it is not whole."""
        with self._lock:
            self._num_held_pages -= len(image.pages)
            if not complete:
                self._free += image.pages
                return
            image.num_uses += 1
            self._images[image.digest] = image
            num_bytes = max(1, len(image.pages)) * self._page_bytes
            value = self._price + image.num_uses * (1 + OPEN_BYTES / num_bytes)
            self._idle.put(image.digest, value)

    def discard(self, digest: str) -> None:
        """Give up a complete image, if there is one and no load holds it."""
        with self._lock:
            if digest in self._idle:
                self._remove(digest)

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        images = self._images.values()
        pages = [page for image in images for page in image.pages]
        addresses = {page.ctypes.data for page in [*pages, *self._free]}
        assert len(addresses) == len(pages) + len(self._free), "a page has two owners"
        held = sum(len(i.pages) for i in images if i.digest not in self._idle)
        reading = self._num_held_pages - held
        assert reading >= 0
        assert len(addresses) + reading == self._num_pages, "a page is lost"
        assert self._num_pages <= self.max_pages
        self._idle.check()

    def _grow(self) -> None:
        self._num_chunks -= 1
        try:
            chunk = self._allocate(self._chunk_pages, self._page_bytes)
        except (MemoryError, RuntimeError) as error:  # RuntimeError: of pinned memory
            self._num_chunks = 0
            logger.warning("no more than %d host pages can be had: %s", self._num_pages, error)
            return
        self._num_pages += len(chunk)
        self._free.extend(chunk)

    def _evict(self) -> None:
        least = self._idle.least()
        assert least is not None, "fewer pages could be had than counted"
        self._price, digest = least
        self._remove(digest)

    def _remove(self, digest: str) -> None:
        self._idle.discard(digest)
        self._free += self._images.pop(digest).pages
