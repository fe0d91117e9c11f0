"""What images take of the pool and of a slot, by their headers, and which could never fit.

Knows numbers only; what is resident, and what could be evicted, is the AdapterPool's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.memory.image_file import ImageError

if TYPE_CHECKING:
    from server.memory.image_file import ImageSize
    from server.memory.image_loader import ImageLoader
    from server.memory.residency import AdapterImage

_MAX_SIZES = 1 << 14
"""Sizes remembered, so that the header of an adapter that comes again is not read here."""


class ImageSizes:
    """The sizes of images, each read once."""

    def __init__(
        self, loader: ImageLoader, *, num_slots: int, num_pages: int, max_rows: int
    ) -> None:
        """The limits are those of the pool: slots, pages, and rank rows of one slot."""
        self._loader = loader
        self._num_slots = num_slots
        self._num_pages = num_pages
        self._max_rows = max_rows
        self._sizes: dict[str, ImageSize] = {}

    def of(self, image: AdapterImage) -> ImageSize:
        """The size of an adapter's image; ImageError when it is broken, or could never fit."""
        size = self._sizes.get(image.digest)
        if size is None:
            size = self._loader.measure(image)
            self._check(image, size)
            if len(self._sizes) >= _MAX_SIZES:
                self._sizes.clear()
            self._sizes[image.digest] = size
        return size

    def misfit(self, image: AdapterImage) -> str | None:
        """Why a combination could never be resident; None if it could, or is none.

        All its members have to be at once, each in a slot of its own, and it needs one more.
        """
        if not image.parts:
            return None
        needed = len(image.parts) + 1
        if needed > self._num_slots:
            return (
                f"a combination of {len(image.parts)} adapters takes {needed} slots, and there "
                f"are {self._num_slots}: leave adapters out, or raise max_adapters"
            )
        try:
            sizes = [self.of(member) for member in image.members]
        except ImageError as error:
            return str(error)
        return _excess(
            [size.num_pages for size in sizes], "pages", "the pool", self._num_pages, "pool_bytes"
        ) or _excess(
            [size.num_rows for size in sizes],
            "rank rows",
            "a slot",
            self._max_rows,
            "max_adapter_rank",
        )

    def _check(self, image: AdapterImage, size: ImageSize) -> None:
        if size.num_pages > self._num_pages:
            raise ImageError(
                f"adapter {image.digest} takes {size.num_pages} pages, the pool has "
                f"{self._num_pages}: make the pool larger (pool_bytes) or the rank smaller"
            )
        if size.num_rows > self._max_rows:
            raise ImageError(
                f"adapter {image.digest} has {size.num_rows} rank rows, a slot has room for "
                f"{self._max_rows}: raise max_adapter_rank or use a smaller rank"
            )


def _excess(numbers: list[int], what: str, where: str, limit: int, setting: str) -> str | None:
    if sum(numbers) <= limit:
        return None
    return (
        f"the adapters of the combination have {' + '.join(map(str, numbers))} = {sum(numbers)} "
        f"{what}, and {where} has room for {limit}: leave adapters out, or raise {setting}"
    )
