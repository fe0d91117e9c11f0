"""The one pool of pages: KV blocks and adapters draw from the same free list.

Knows how large a page is and which pages are free; not what lies in them.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kernels.layout import row_elements

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from adapters_store.layout import TargetShape

BLOCK_SIZES = (16, 8, 4)
"""Tokens in a block, the preferred one first: large pages need short block tables."""

MIN_FILL = 0.97
"""Least share of its pages that a rank-8 adapter has to fill."""


HUGE_PAGE_BYTES = 2 << 20
"""Of the operating system, where it has them; blocks of a sequence lie far apart, and ordinary
pages of 4 KiB would cost a walk of the page tables for each."""


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was allocated."""


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """The shape of a page: the KV cache of `block_size` tokens over all layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def page_elements(self) -> int:
        """Elements of a page, [num_layers, 2, block_size, num_kv_heads, head_dim]."""
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim


def choose_block_size(
    num_layers: int, num_kv_heads: int, head_dim: int, targets: Iterable[TargetShape]
) -> int:
    """The largest of BLOCK_SIZES whose pages a rank-8 adapter of all targets fills to MIN_FILL.

    Counts elements and leaves out what row boundaries cost. Where no block size reaches MIN_FILL
    it is the one that comes closest. `targets` are those of one layer.
    """
    sizes = [row_elements(t.in_features, t.out_features) for t in targets]
    adapter_elements = 8 * num_layers * sum(sizes)

    def fill(block_size: int) -> float:
        elements = PageGeometry(num_layers, num_kv_heads, head_dim, block_size).page_elements
        if not sizes or max(sizes) > elements:
            return 0.0
        return adapter_elements / (-(-adapter_elements // elements) * elements)

    return next((b for b in BLOCK_SIZES if fill(b) >= MIN_FILL), max(BLOCK_SIZES, key=fill))


class PagePool:
    """Pages of device memory, each free or with exactly one owner, who frees it.

    Invariant: a page is in the free list once when it is free, and never when it is owned; one that
    was set aside is neither.
    """

    _pages: range
    _free: list[int]
    _is_free: bytearray

    def __init__(
        self, num_pages: int, page_elements: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Take the memory at once. Raises ValueError unless both sizes are positive."""
        if num_pages < 1 or page_elements < 1:
            raise ValueError(
                f"a pool of {num_pages} pages of {page_elements} elements holds nothing: "
                "give it more bytes (pool_bytes), at least those of one page"
            )
        self.storage = _zeros(num_pages, page_elements, dtype, device)
        self.price = 0.0  # written by the Reclaimer alone, which says what it is
        self._own(range(num_pages))

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def page_elements(self) -> int:
        return self.storage.shape[1]

    @property
    def page_bytes(self) -> int:
        return self.page_elements * self.storage.element_size()

    def is_free(self, page: int) -> bool:
        return page in self._pages and bool(self._is_free[page])

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages; their content is whatever was there. Raises OutOfPages and takes none."""
        if num_pages < 0:
            raise ValueError(f"cannot allocate {num_pages} pages: ask for 0 or more")
        if num_pages > len(self._free):
            raise OutOfPages(
                f"{num_pages} pages asked for, {len(self._free)} of {self.num_pages} free: "
                "evict or preempt first, or make the pool larger (pool_bytes)"
            )
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises ValueError at a page that is free already or not of this pool."""
        for page in pages:
            if page not in self._pages:
                raise ValueError(f"page {page} is not one of the pool's {self.num_pages} pages")
            if self._is_free[page]:
                raise ValueError(f"page {page} is free already: only its owner may free it, once")
            self._is_free[page] = 1
            self._free.append(page)

    def set_aside(self) -> int:
        """Take the last page out of the pool for good, for what belongs to nobody; return it.

        The pool has one page fewer then. Raises ValueError when it would have none, or when the
        page is in use: ask before anything is allocated.
        """
        page = self._pages[-1]
        if self.num_pages == 1 or not self._is_free[page]:
            raise ValueError(
                f"page {page} of {self.num_pages} cannot be set aside: it has to be free, and "
                "another has to be left; make the pool larger (pool_bytes)"
            )
        self._free.remove(page)
        self._pages = self._pages[:-1]
        return page

    def split(self, num_pages: int) -> tuple[PagePool, PagePool]:
        """Two pools in place of this one, over the same storage: the first `num_pages`, the rest.

        This one has to be left alone then. Raises ValueError unless all its pages are free and
        each part gets at least one.
        """
        if not 0 < num_pages < self.num_pages or self.num_free != self.num_pages:
            raise ValueError(
                f"a pool of {self.num_pages} pages, {self.num_free} of them free, cannot be split "
                f"into {num_pages} and the rest: each part has a page at least, and all are free"
            )
        first, rest = copy(self), copy(self)
        first._own(self._pages[:num_pages])
        rest._own(self._pages[num_pages:])
        return first, rest

    def check(self) -> None:
        """Recompute the invariant; AssertionError when it does not hold."""
        assert len(set(self._free)) == len(self._free), "a page is in the free list twice"
        listed = set(self._free)
        flagged = {page for page in self._pages if self._is_free[page]}
        assert listed == flagged, f"free list and flags differ in {sorted(listed ^ flagged)}"
        assert self._pages.stop <= self.storage.shape[0]

    def _own(self, pages: range) -> None:
        self._pages = pages
        self._free = list(reversed(pages))  # taken from the end: lowest page first
        self._is_free = bytearray(b"\x01") * pages.stop


def _zeros(
    num_pages: int, page_elements: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Zeros [num_pages, page_elements]; on a CPU in huge pages, and taken when first written."""
    import torch  # here: the geometry of pages is asked for where no tensor is needed

    if torch.device(device).type != "cpu":
        return torch.zeros(num_pages, page_elements, dtype=dtype, device=device)
    num_bytes = num_pages * page_elements * dtype.itemsize
    host = np.zeros(num_bytes + HUGE_PAGE_BYTES, dtype=np.uint8)  # numpy asks for huge pages
    start = -host.ctypes.data % HUGE_PAGE_BYTES
    return torch.from_numpy(host[start : start + num_bytes]).view(dtype).view(num_pages, -1)
