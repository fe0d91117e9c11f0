"""Who gives up pages when they run short: cached prefixes and idle adapters, by one value.

The one place that decides what is evicted. It knows what is idle and what it is worth, not who
asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.memory.residency import COMBINATION

if TYPE_CHECKING:
    from collections.abc import Collection

    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache
    from server.memory.page_pool import PagePool
    from server.memory.residency import AdapterImage


class Reclaimer:
    """Evicts the least valuable page first, be it a cached block's or an adapter's.

    The order is GreedyDual-Size-Frequency (Cherkasova 1998): something that becomes idle has the
    priority L + uses · seconds, where seconds is what a page of it costs to come back, and L, the
    pool's `price`, is the priority of what was evicted last. So L is a clock that runs at the pace
    of evictions: what was of use lately or often is worth more than what was so long ago, nothing
    is ever sorted again, and an eviction costs O(log n) of what is idle.

    With an adapter its cached prefixes go: without its weights nobody can go on from them. Those
    of a combination go by their own value: it leaves the device with each last user, and comes
    back. Where blocks and adapters have pools of their own, each gives up its own only.
    Invariant: where they share a pool, an adapter of which there are blocks, if it is no
    combination, is resident.
    """

    def __init__(self, kv_cache: KVCache, adapters: AdapterPool) -> None:
        self._prefixes = kv_cache.prefixes
        self._adapters = adapters
        self._is_shared = kv_cache.prefixes.pool is adapters.pool

    def has_room(self, num_pages: int, keep: Collection[str] = ()) -> bool:
        """Whether `make_room` would succeed."""
        return num_pages <= self._prefixes.pool.num_free + self.num_reclaimable(keep)

    def num_reclaimable(self, keep: Collection[str] = ()) -> int:
        """Pages that `make_room` could free for the KV cache, sparing the adapters in `keep`."""
        return self._num_reclaimable(self._prefixes.pool, keep)

    def make_room(self, num_pages: int, keep: Collection[str] = ()) -> bool:
        """Have `num_pages` free for the KV cache, evicting as little of value as possible.

        Spares the adapters in `keep`, though not their cached prefixes. False, and nothing is
        evicted, when that is not enough.
        """
        return self._make_room(self._prefixes.pool, num_pages, keep)

    def load(self, image: AdapterImage, *, keep: Collection[str] = (), num_spare: int = 0) -> bool:
        """AdapterPool.request that evicts for pages and for a slot, if that is enough.

        Spares the adapters in `keep`. After it the KV cache can have `num_spare` pages: they are
        free, or to be had by `make_room` without those adapters.
        """
        adapters, pool = self._adapters, self._adapters.pool
        num_spare = num_spare if self._is_shared else 0
        if adapters.request(image, num_spare=num_spare):
            return True
        num_pages = adapters.pages_for(image)
        least = None if adapters.has_free_slot else adapters.least_idle(keep)
        if not adapters.has_free_slot and least is None:
            return False
        if num_pages + num_spare > pool.num_free + self._num_reclaimable(pool, keep):
            return False
        if least is not None:
            self._evict_adapter(*least)
        self._make_room(pool, num_pages, keep)
        return adapters.request(image)

    def make_slot(self, image: AdapterImage, keep: Collection[str] = ()) -> bool:
        """Have a slot for a combination, evicting the least valuable adapter if it needs one.

        Spares its members, and those in `keep` where another is idle. False when none is.
        """
        adapters = self._adapters
        if not adapters.needs_slot(image) or adapters.has_free_slot:
            return True
        members = {member.digest for member in image.members}
        least = adapters.least_idle(members.union(keep)) or adapters.least_idle(members)
        if least is not None:
            self._evict_adapter(*least)
        return least is not None

    def forget(self, digest: str) -> None:
        """Free the cached prefixes of an adapter that has left the device."""
        self._prefixes.evict_of(digest)

    def check(self) -> None:
        """Recompute the invariant; AssertionError when it does not hold."""
        if self._is_shared:
            for digest in self._prefixes.digests:
                is_there = self._adapters.is_resident(digest) or digest.startswith(COMBINATION)
                assert is_there, "prefixes of an adapter that is gone"

    def _num_reclaimable(self, pool: PagePool, keep: Collection[str]) -> int:
        num_blocks = self._prefixes.num_idle if self._prefixes.pool is pool else 0
        return num_blocks + (
            self._adapters.num_idle_pages(keep) if self._adapters.pool is pool else 0
        )

    def _make_room(self, pool: PagePool, num_pages: int, keep: Collection[str]) -> bool:
        if num_pages <= pool.num_free:
            return True
        has_blocks, has_adapters = self._prefixes.pool is pool, self._adapters.pool is pool
        num_at_hand = pool.num_free + (self._prefixes.num_idle if has_blocks else 0)
        if num_pages > num_at_hand and (
            num_pages > pool.num_free + self._num_reclaimable(pool, keep)
        ):
            return False
        # The least of all is found at once, the least of those that are not kept is not.
        adapter, may_be_kept = self._adapters.least_idle() if has_adapters else None, bool(keep)
        while pool.num_free < num_pages:
            block = self._prefixes.least_idle() if has_blocks else None
            if may_be_kept and adapter is not None and (block is None or adapter[0] < block[0]):
                adapter, may_be_kept = self._adapters.least_idle(keep), False
            if block is not None and (adapter is None or block[0] <= adapter[0]):
                pool.price = max(pool.price, block[0])
                self._prefixes.evict(block[1])
            else:
                assert adapter is not None, "fewer pages were reclaimable than counted"
                self._evict_adapter(*adapter)
                adapter = self._adapters.least_idle(keep)
        return True

    def _evict_adapter(self, priority: float, digest: str) -> None:
        pool = self._adapters.pool
        pool.price = max(pool.price, priority)
        if self._is_shared:
            self._prefixes.evict_of(digest)
        self._adapters.evict(digest)
