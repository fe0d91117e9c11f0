"""Which adapters are on the device: slots, pins, loads and evictions.

Knows digests and images, not names; never waits for a load.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from server.memory.idle_heap import IdleHeap
from server.memory.image_file import ImageError, RankTable
from server.memory.image_loader import TIMEOUT_SECONDS, ThreadedImageLoader
from server.memory.image_sizes import ImageSizes
from server.memory.loads import Loads
from server.memory.residency import ResidentAdapter
from server.memory.row_table import RowTable, combine

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from adapters_store.layout import BaseLayout
    from kernels.layout import RankRows
    from server.memory.image_loader import ImageLoader
    from server.memory.page_pool import PagePool
    from server.memory.residency import AdapterImage


class LoadResult(NamedTuple):
    """The end of one load."""

    digest: str
    error: str | None  # message for the client; None = resident


@dataclass(slots=True)
class _Adapter:
    """One adapter or combination that holds a slot; changed only by AdapterPool."""

    image: AdapterImage
    slot: int
    pages: list[int]  # its own: a combination has none
    rows: RankTable | None = None  # where its rank rows lie in the pool; None until it is loaded
    num_users: int = 0
    num_uses: int = 0

    @property
    def loaded(self) -> bool:
        return self.rows is not None

    @property
    def is_idle(self) -> bool:
        return self.loaded and self.num_users == 0


class AdapterPool:
    """Residency of adapters by digest: absent → loading → resident (idle or pinned) → absent.

    A combination is resident while it has users, in a slot of its own, its rows in the pages of
    its members: each of these is resident, once for all, and has the combination's users, too.

    Invariants: a slot and a page belong to one adapter; only idle adapters are evicted; the row
    table of a slot without a resident adapter is empty; every row of a resident one lies in its
    own pages, or its members'. All methods belong to one thread; the loader's thread only reports.
    """

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        max_rows: int,
        layout: BaseLayout,
        *,
        loader: ImageLoader | None = None,
        load_timeout_seconds: float = TIMEOUT_SECONDS,
        page_seconds: float = 1.0,
        on_loaded: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocate the row table of `num_slots` slots of `max_rows` rows on the pool's device.

        `page_seconds` is what it costs to load a page again, by which evictions are decided.
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
        self.pool = pool
        self._table = RowTable(num_slots, max_rows, layout, pool.storage.device)
        self._loader = loader or ThreadedImageLoader(pool.storage, layout)
        self._loads = Loads(
            self._loader, timeout_seconds=load_timeout_seconds, on_ended=on_loaded, clock=clock
        )
        self._adapters: dict[str, _Adapter] = {}
        self._combinations: dict[str, _Adapter] = {}  # those that have users
        self._by_slot: list[_Adapter | None] = [None] * num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._sizes = ImageSizes(
            self._loader, num_slots=num_slots, num_pages=pool.num_pages, max_rows=max_rows
        )
        self._refused: list[LoadResult] = []  # failed before they took a page
        self._page_seconds = page_seconds
        self._idle: IdleHeap[str] = IdleHeap()
        self._num_idle_pages = 0

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
        return len(self._loads)

    @property
    def num_host_loads(self) -> int:
        """Loads that found their image in host memory."""
        return self._loader.host.num_hits

    @property
    def num_cancelled_loads(self) -> int:
        return self._loads.num_cancelled

    def is_loading(self, digest: str) -> bool:
        return digest in self._loads

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
        """Pages of adapters that may be evicted, those in `keep` excepted."""
        kept = (self._adapters[digest].pages for digest in set(keep) if digest in self._idle)
        return self._num_idle_pages - sum(map(len, kept))

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def least_idle(self, keep: Collection[str] = ()) -> tuple[float, str] | None:
        """Priority and digest of the least valuable adapter that may be evicted; None without."""
        return self._idle.least(keep)

    def pages_for(self, image: AdapterImage) -> int:
        """Pages that a load of the image takes. Raises ImageError where `request` reports one."""
        return self._sizes.of(image).num_pages

    def misfit(self, image: AdapterImage) -> str | None:
        """Why a combination could never be resident; None if it could, or is none.

        Reads the members' headers, each once only, as `request` does.
        """
        return self._sizes.misfit(image)

    def needs_slot(self, image: AdapterImage) -> bool:
        """Whether its next user takes a free slot: of a combination without users."""
        return bool(image.parts) and image.digest not in self._combinations

    def report(self) -> tuple[ResidentAdapter, ...]:
        in_host = self._loader.host.num_pages_by_digest()
        on_device = [
            ResidentAdapter(
                digest=digest,
                state="resident" if adapter.loaded else "loading",
                num_pages=len(adapter.pages),
                num_users=adapter.num_users,
                num_uses=adapter.num_uses,
                num_host_pages=in_host.pop(digest, 0),
            )
            for digest, adapter in self._adapters.items()
        ]
        others = (ResidentAdapter(d, "host", num_host_pages=n) for d, n in in_host.items())
        return (*on_device, *others)

    # Loads.

    def request(
        self,
        image: AdapterImage,
        *,
        num_spare: int = 0,
        is_preload: bool = False,
    ) -> bool:
        """Start a load when pages and a slot can be had; False when they cannot be had now.

        True says that `poll` returns this digest's result, or did. Reads the file's header, no
        more, and once only. Leaves `num_spare` pages free and evicts nothing: see Reclaimer.load.
        A preload is not ended by `cancel`.
        """
        digest = image.digest
        if digest in self._loads:
            if (error := self._loads.join(digest, is_preload=is_preload)) is not None:
                self._refused.append(LoadResult(digest, error))
            return True
        if digest in self._adapters:
            return True
        try:
            size = self._sizes.of(image)
        except ImageError as error:
            self._refused.append(LoadResult(digest, str(error)))
            return True
        if size.num_pages + num_spare > self.pool.num_free or not self._free_slots:
            return False
        adapter = _Adapter(image, self._free_slots.pop(), self.pool.allocate(size.num_pages))
        self._adapters[digest] = adapter
        self._by_slot[adapter.slot] = adapter
        self._loads.start(image, adapter.pages, is_preload=is_preload)
        return True

    def cancel(self, digest: str) -> None:
        """No request waits for the adapter any more: end its load, unless it is a preload.

        Pages and slot come back in a later `poll`, when no thread can write the pages any more. A
        `request` until then takes the cancel back.
        """
        self._loads.cancel(digest)

    def poll(self) -> list[LoadResult]:
        """Make finished loads resident, give back the pages of the others, and say which.

        A load that takes too long is said to have failed; its pages come back when it has ended.
        """
        results, self._refused = self._refused, []
        for digest, outcome in self._loads.take_ended():
            if isinstance(outcome, RankTable):
                self._install(self._adapters[digest], outcome)
                results.append(LoadResult(digest, None))
            else:
                self._remove(self._adapters[digest])
                if outcome is not None:
                    results.append(LoadResult(digest, str(outcome)))
        results += [LoadResult(*overdue) for overdue in self._loads.take_overdue()]
        return results

    def close(self) -> None:
        """End the copies in progress; the pool is of no use afterwards."""
        self._loader.close()

    # Users.

    def acquire(self, digest: str) -> int | None:
        """Pin the adapter for one more user and return its slot; None unless it is resident."""
        adapter = self._adapters.get(digest)
        if adapter is None or not adapter.loaded:
            return None
        if adapter.is_idle:
            self._withdraw(adapter)
        adapter.num_users += 1
        adapter.num_uses += 1
        return adapter.slot

    def combine(self, image: AdapterImage) -> int | None:
        """`acquire` for a combination, and so for all its members; its slot.

        None unless all members are resident and, if it `needs_slot`, one is free.
        """
        members = [self._adapters.get(member.digest) for member in image.members]
        tables = [x.rows for x in members if x is not None and x.rows is not None]
        if len(tables) < len(members) or (self.needs_slot(image) and not self._free_slots):
            return None
        if self.needs_slot(image):
            rows = combine(tables, [part.weight for part in image.parts])
            mix = _Adapter(image, self._free_slots.pop(), [], rows)
            self._table.install(mix.slot, rows)
            self._combinations[image.digest] = self._by_slot[mix.slot] = mix
        for member in image.members:
            self.acquire(member.digest)
        mix = self._combinations[image.digest]
        mix.num_users += 1
        return mix.slot

    def release(self, digest: str) -> None:
        """Take back one `acquire` or `combine`. Raises ValueError when there is none."""
        if (mix := self._combinations.get(digest)) is not None:
            self._release_combination(mix)
            return
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.num_users == 0:
            raise ValueError(f"adapter {digest} has no users: release it once for each acquire")
        adapter.num_users -= 1
        if adapter.is_idle:
            self._offer(adapter)

    # Evictions.

    def evict(self, digest: str) -> None:
        """Take an idle adapter off the device to make room. Raises ValueError unless it is idle."""
        adapter = self._adapters.get(digest)
        if adapter is None or not adapter.is_idle:
            raise ValueError(f"adapter {digest} is not idle: only an idle adapter is evicted")
        self._remove(adapter)
        self.num_evictions += 1

    def drop(self, digest: str) -> int | None:
        """Take an idle adapter off device and host; the device's bytes freed, 0 when absent there.

        None, and nothing happens, while it is pinned or loading: ask again after that.
        """
        adapter = self._adapters.get(digest)
        if adapter is not None and not adapter.is_idle:
            return None
        self._loader.host.discard(digest)
        if adapter is None:
            return 0
        self._remove(adapter)
        return len(adapter.pages) * self.pool.page_bytes

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        pages = [page for adapter in self._adapters.values() for page in adapter.pages]
        assert len(set(pages)) == len(pages), "two adapters share a page"
        assert not any(self.pool.is_free(page) for page in pages), "an adapter holds a free page"
        assert all(a.num_users == 0 for a in self._adapters.values() if not a.loaded)
        assert all(a.num_users >= 0 for a in self._adapters.values())
        self._loads.check({d: a.pages for d, a in self._adapters.items() if not a.loaded})
        idle = {digest: a for digest, a in self._adapters.items() if a.is_idle}
        assert idle.keys() == {d for d in self._adapters if d in self._idle}
        assert len(idle) == len(self._idle)
        assert self._num_idle_pages == sum(len(a.pages) for a in idle.values())
        self._idle.check()
        with_slot = [*self._adapters.values(), *self._combinations.values()]
        used = {adapter.slot: adapter for adapter in with_slot}
        assert len(used) == len(with_slot), "two adapters share a slot"
        assert sorted([*used, *self._free_slots]) == list(range(self.num_slots))
        for slot, held in enumerate(self._by_slot):
            assert held is used.get(slot), f"slot {slot} is not that of its adapter"
            self._table.check(slot, self._pages_of(held) if held and held.loaded else [])
        for mix in self._combinations.values():
            assert mix.num_users > 0, "a combination without users"
            assert all(self._adapters[x.digest].num_users for x in mix.image.members), "no pin"

    def _pages_of(self, adapter: _Adapter) -> list[int]:
        """The pages in which its rows lie."""
        return [page for x in adapter.image.members for page in self._adapters[x.digest].pages]

    def _release_combination(self, mix: _Adapter) -> None:
        mix.num_users -= 1
        if mix.num_users == 0:
            self._free_slot(mix.slot)
            del self._combinations[mix.image.digest]
        for member in mix.image.members:
            self.release(member.digest)

    def _resident_in(self, slot: int) -> _Adapter:
        adapter = self._by_slot[slot] if 0 <= slot < len(self._by_slot) else None
        if adapter is None or not adapter.loaded:
            raise KeyError(f"slot {slot} has no resident adapter")
        return adapter

    def _install(self, adapter: _Adapter, table: RankTable) -> None:
        adapter.rows = self._table.locate(table, adapter.pages)
        self._table.install(adapter.slot, adapter.rows)
        self.num_loads += 1
        self._offer(adapter)

    def _offer(self, adapter: _Adapter) -> None:
        """It has become idle: its worth a page is its uses times what a page costs to load again.

        A load that nobody has made use of yet was made for one use.
        """
        worth = max(1, adapter.num_uses) * self._page_seconds
        self._idle.put(adapter.image.digest, self.pool.price + worth)
        self._num_idle_pages += len(adapter.pages)

    def _withdraw(self, adapter: _Adapter) -> None:
        self._idle.discard(adapter.image.digest)
        self._num_idle_pages -= len(adapter.pages)

    def _remove(self, adapter: _Adapter) -> None:
        if adapter.is_idle:
            self._withdraw(adapter)
        self.pool.free(adapter.pages)
        self._free_slot(adapter.slot)
        del self._adapters[adapter.image.digest]

    def _free_slot(self, slot: int) -> None:
        self._table.clear(slot)
        self._free_slots.append(slot)
        self._by_slot[slot] = None
