"""What is idle, the least valuable first: a heap whose entries may be withdrawn and replaced.

Knows keys and priorities; not what they stand for.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable

Key = TypeVar("Key", bound="Hashable")

_MAX_STALE = 64
"""Stale entries that are kept, beside one for each key, before all are swept out."""


class IdleHeap(Generic[Key]):
    """Keys by priority, those of equal priority by how long they are in it.

    Invariant: each key has one entry that counts, which is in the heap; the others are stale, and
    are skipped when they come to the front. So putting and removing cost O(log n) at most.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._entries: dict[Key, tuple[float, int, Key]] = {}
        self._order = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def put(self, key: Key, priority: float) -> None:
        """Put a key in, or change its priority."""
        entry = self._entries[key] = (priority, next(self._order), key)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + _MAX_STALE:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def discard(self, key: Key) -> None:
        """Take a key out; one that is not in it is ignored."""
        self._entries.pop(key, None)

    def least(self, spared: Collection[Key] = ()) -> tuple[float, Key] | None:
        """Priority and key of the least valuable one that is not spared; None without one.

        It stays. Costs O(log n) for each spared one that comes before it.
        """
        kept: list[tuple[float, int, Key]] = []
        found = None
        while self._heap and found is None:
            entry = self._heap[0]
            if self._entries.get(entry[2]) is not entry:
                heappop(self._heap)
            elif entry[2] in spared:
                kept.append(heappop(self._heap))
            else:
                found = entry[0], entry[2]
        for entry in kept:
            heappush(self._heap, entry)
        return found

    def check(self) -> None:
        """Recompute the invariant; AssertionError when it does not hold."""
        counted = [entry for entry in self._heap if self._entries.get(entry[2]) is entry]
        assert len(counted) == len(self._entries), "an idle key has no entry in the heap, or two"
        assert all(heap <= child for heap, child in _edges(self._heap)), "the heap is out of order"


def _edges(heap: list[tuple[float, int, Key]]) -> list[tuple[tuple[float, int], tuple[float, int]]]:
    return [(heap[(i - 1) // 2][:2], heap[i][:2]) for i in range(1, len(heap))]
