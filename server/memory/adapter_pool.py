"""Which adapters are on the device: slots, pins, loads and evictions.

Knows digests and images, not names; never waits for a load.
"""

from __future__ import annotations

from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from server.memory.image_loader import ImageError, ThreadedImageLoader
from server.memory.residency import ResidentAdapter
from server.memory.row_table import RowTable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from adapters_store.layout import BaseLayout
    from kernels.layout import RankRows
    from server.memory.image_loader import ImageLoader, ImageSize, RankTable
    from server.memory.page_pool import PagePool
    from server.memory.residency import AdapterImage

_MAX_SIZES = 1024
"""Image sizes remembered between a request that found no room and the next."""


class LoadResult(NamedTuple):
    """The end of one load."""

    digest: str
    error: str | None  # message for the client; None = resident


@dataclass(slots=True)
class _Adapter:
    """One adapter that holds pages and a slot; changed only by AdapterPool."""

    image: AdapterImage
    slot: int
    pages: list[int]
    loaded: bool = False
    num_users: int = 0
    num_uses: int = 0
    last_used: int = 0  # AdapterPool's clock

    @property
    def is_idle(self) -> bool:
        return self.loaded and self.num_users == 0


class AdapterPool:
    """Residency of adapters by digest: absent → loading → resident (idle or pinned) → absent.

    Invariants: a slot and a page belong to one adapter; only idle adapters are evicted; the row
    table of a slot without a resident adapter is empty; every row of a resident one lies in its
    own pages. All methods belong to one thread; the loader's thread only reports.
    """

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        max_rows: int,
        layout: BaseLayout,
        *,
        loader: ImageLoader | None = None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """Allocate the row table of `num_slots` slots of `max_rows` rows on the pool's device.

        `on_loaded` is called from the loader's thread at the end of each load, for `poll` to take.
        Raises ValueError without a slot, or when the pool's pages are not those of the layout.
        """
        if num_slots < 1:
            raise ValueError(f"{num_slots} slots hold no adapter: max_adapters is at least 1")
        dtype = str(pool.storage.dtype).removeprefix("torch.")
        if (pool.page_elements, dtype) != (layout.page_elements, layout.dtype):
            raise ValueError(
                f"the pool has pages of {pool.page_elements} elements in {dtype}, the layout "
                f"{layout.page_elements} in {layout.dtype}: build both from one geometry"
            )
        self.num_loads = 0
        self.num_evictions = 0
        self._pool = pool
        self._table = RowTable(num_slots, max_rows, layout, pool.storage.device)
        self._loader = loader or ThreadedImageLoader(pool.storage, layout)
        self._on_loaded = on_loaded
        self._adapters: dict[str, _Adapter] = {}
        self._by_slot: list[_Adapter | None] = [None] * num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._sizes: dict[str, ImageSize] = {}
        self._refused: list[LoadResult] = []  # failed before they took a page
        self._done: SimpleQueue[tuple[str, RankTable | ImageError]] = SimpleQueue()
        self._num_loading = 0
        self._clock = 0

    # What is there.

    @property
    def rows(self) -> RankRows:
        """Where the rank rows of every slot lie; the same tensors for the pool's whole life."""
        return self._table.rows

    @property
    def num_slots(self) -> int:
        return len(self._by_slot)

    @property
    def num_pages(self) -> int:
        """Pages that adapters hold, loading ones included."""
        return sum(len(adapter.pages) for adapter in self._adapters.values())

    @property
    def num_loading(self) -> int:
        return self._num_loading

    def is_resident(self, digest: str) -> bool:
        adapter = self._adapters.get(digest)
        return adapter is not None and adapter.loaded

    def digest_of(self, slot: int) -> str:
        """Of the adapter whose rows the slot has. Raises KeyError at a slot without one."""
        return self._resident_in(slot).image.digest

    def max_span_rows(self, slot: int) -> int:
        """Most rows that any span (q,k,v; o; gate,up; down) of any layer has in the slot."""
        self._resident_in(slot)
        return self._table.max_span_rows[slot]

    def num_idle_pages(self, keep: Collection[str] = ()) -> int:
        """Pages that `evict_idle` with the same `keep` could free at most."""
        return sum(len(adapter.pages) for adapter in self._idle(keep))

    def report(self) -> tuple[ResidentAdapter, ...]:
        return tuple(
            ResidentAdapter(
                digest=digest,
                state="resident" if adapter.loaded else "loading",
                num_pages=len(adapter.pages),
                num_users=adapter.num_users,
                num_uses=adapter.num_uses,
            )
            for digest, adapter in self._adapters.items()
        )

    # Loads.

    def request(
        self,
        image: AdapterImage,
        *,
        keep: Collection[str] = (),
        num_spare: int = 0,
        may_evict: bool = True,
    ) -> bool:
        """Start a load when pages and a slot can be had; False when they cannot be had now.

        True says that `poll` returns this digest's result, or did. Reads the file's header, no
        more. Evicts the least valuable idle adapters, those in `keep` excepted, when that makes
        room, and none when it does not; leaves `num_spare` pages free.
        """
        digest = image.digest
        if digest in self._adapters:
            return True
        try:
            size = self._size(image)
        except ImageError as error:
            self._refused.append(LoadResult(digest, str(error)))
            return True
        num_missing = size.num_pages + num_spare - self._pool.num_free
        if num_missing > 0 or not self._free_slots:
            victims = self._victims(num_missing, keep) if may_evict else None
            if victims is None:
                return False
            for victim in victims:
                self._evict(victim)
        adapter = _Adapter(image, self._free_slots.pop(), self._pool.allocate(size.num_pages))
        self._adapters[digest] = adapter
        self._by_slot[adapter.slot] = adapter
        self._num_loading += 1
        del self._sizes[digest]
        self._loader.start(image, adapter.pages, lambda outcome: self._finish(digest, outcome))
        return True

    def poll(self) -> list[LoadResult]:
        """Make finished loads resident, give back the pages of failed ones, and say which."""
        results, self._refused = self._refused, []
        while True:
            try:
                digest, outcome = self._done.get_nowait()
            except Empty:
                return results
            self._num_loading -= 1
            if isinstance(outcome, ImageError):
                self._remove(self._adapters[digest])
                results.append(LoadResult(digest, str(outcome)))
            else:
                self._install(self._adapters[digest], outcome)
                results.append(LoadResult(digest, None))

    def close(self) -> None:
        """Wait for the copy in progress; the pool is of no use afterwards."""
        self._loader.close()

    # Users.

    def acquire(self, digest: str) -> int | None:
        """Pin the adapter for one more user and return its slot; None unless it is resident."""
        adapter = self._adapters.get(digest)
        if adapter is None or not adapter.loaded:
            return None
        self._touch(adapter)
        adapter.num_users += 1
        adapter.num_uses += 1
        return adapter.slot

    def release(self, digest: str) -> None:
        """Take back one `acquire`. Raises ValueError when there is none to take back."""
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.num_users == 0:
            raise ValueError(f"adapter {digest} has no users: release it once for each acquire")
        adapter.num_users -= 1
        self._touch(adapter)

    # Evictions.

    def evict_idle(self, num_pages: int, keep: Collection[str] = ()) -> int:
        """Evict idle adapters, the least valuable first, until `num_pages` are free of them.

        Spares those in `keep`. Returns the pages freed: more than asked for when the last one was
        large, fewer when no more are idle.
        """
        num_freed = 0
        for adapter in self._idle(keep):
            if num_freed >= num_pages:
                break
            num_freed += len(adapter.pages)
            self._evict(adapter)
        return num_freed

    def drop(self, digest: str) -> int | None:
        """Take an idle adapter off the device and return the bytes freed, 0 when it is absent.

        None, and nothing happens, while it is pinned or loading: ask again after that.
        """
        adapter = self._adapters.get(digest)
        if adapter is None:
            return 0
        if not adapter.is_idle:
            return None
        self._remove(adapter)
        return len(adapter.pages) * self._pool.page_bytes

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        pages = [page for adapter in self._adapters.values() for page in adapter.pages]
        assert len(set(pages)) == len(pages), "two adapters share a page"
        assert not any(self._pool.is_free(page) for page in pages), "an adapter holds a free page"
        assert all(a.num_users == 0 for a in self._adapters.values() if not a.loaded)
        assert all(a.num_users >= 0 for a in self._adapters.values())
        assert self._num_loading == sum(not adapter.loaded for adapter in self._adapters.values())
        used = {adapter.slot: adapter for adapter in self._adapters.values()}
        assert len(used) == len(self._adapters), "two adapters share a slot"
        assert sorted([*used, *self._free_slots]) == list(range(self.num_slots))
        for slot, held in enumerate(self._by_slot):
            assert held is used.get(slot), f"slot {slot} is not that of its adapter"
            self._table.check(slot, held.pages if held is not None and held.loaded else [])

    def _resident_in(self, slot: int) -> _Adapter:
        adapter = self._by_slot[slot] if 0 <= slot < self.num_slots else None
        if adapter is None or not adapter.loaded:
            raise KeyError(f"slot {slot} has no resident adapter")
        return adapter

    def _size(self, image: AdapterImage) -> ImageSize:
        size = self._sizes.get(image.digest)
        if size is None:
            size = self._loader.measure(image)
            self._check_size(image, size)
            if len(self._sizes) >= _MAX_SIZES:
                self._sizes.clear()
            self._sizes[image.digest] = size
        return size

    def _check_size(self, image: AdapterImage, size: ImageSize) -> None:
        if size.num_pages > self._pool.num_pages:
            raise ImageError(
                f"adapter {image.digest} takes {size.num_pages} pages, the pool has "
                f"{self._pool.num_pages}: make the pool larger (pool_bytes) or the rank smaller"
            )
        if size.num_rows > self._table.max_rows:
            raise ImageError(
                f"adapter {image.digest} has {size.num_rows} rank rows, a slot has room for "
                f"{self._table.max_rows}: raise max_adapter_rank or use a smaller rank"
            )

    def _finish(self, digest: str, outcome: RankTable | ImageError) -> None:
        self._done.put((digest, outcome))
        self._on_loaded()

    def _install(self, adapter: _Adapter, table: RankTable) -> None:
        self._table.install(adapter.slot, table, adapter.pages)
        adapter.loaded = True
        self.num_loads += 1
        self._touch(adapter)

    def _touch(self, adapter: _Adapter) -> None:
        self._clock += 1
        adapter.last_used = self._clock

    def _value(self, adapter: _Adapter) -> float:
        """Recency × frequency ÷ reload cost: what a page that it holds is worth."""
        age = self._clock - adapter.last_used + 1
        return (adapter.num_uses + 1) / (age * max(1, len(adapter.pages)))

    def _idle(self, keep: Collection[str]) -> list[_Adapter]:
        """Those that may be evicted, the least valuable first."""
        idle = (a for digest, a in self._adapters.items() if a.is_idle and digest not in keep)
        return sorted(idle, key=self._value)

    def _victims(self, num_pages: int, keep: Collection[str]) -> list[_Adapter] | None:
        """The idle adapters whose eviction gives `num_pages` pages and a slot; None if too few."""
        victims: list[_Adapter] = []
        num_freed = 0
        for adapter in self._idle(keep):
            if num_freed >= num_pages and (victims or self._free_slots):
                break
            victims.append(adapter)
            num_freed += len(adapter.pages)
        enough = num_freed >= num_pages and bool(victims or self._free_slots)
        return victims if enough else None

    def _evict(self, adapter: _Adapter) -> None:
        self._remove(adapter)
        self.num_evictions += 1

    def _remove(self, adapter: _Adapter) -> None:
        self._table.clear(adapter.slot)
        self._pool.free(adapter.pages)
        self._free_slots.append(adapter.slot)
        self._by_slot[adapter.slot] = None
        del self._adapters[adapter.image.digest]
