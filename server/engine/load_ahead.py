"""The adapters that the queue's front needs: loaded in its order, and kept while it waits.

Knows what waits and what is resident; admits nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.engine.sequence import Status

if TYPE_CHECKING:
    from server.engine.drains import Drains
    from server.engine.sequence import Sequence
    from server.engine.waiting import WaitingQueue
    from server.memory.adapter_pool import AdapterPool
    from server.memory.reclaim import Reclaimer
    from server.memory.residency import AdapterImage

LOOKAHEAD = 32
"""Heads of the queue, from the front, whose adapters are loaded ahead and kept."""

MAX_LOADING = 4
"""Adapters that load at once: enough to keep the copying busy, few enough to stay in order."""


class LoadAhead:
    """Starts and gives up loads, and says who has to wait for one."""

    def __init__(
        self,
        waiting: WaitingQueue,
        adapters: AdapterPool,
        reclaimer: Reclaimer,
        drains: Drains,
        lookahead: int,
    ) -> None:
        self.wanted: frozenset[str] = frozenset()  # adapters of the queue's front
        self._waiting = waiting
        self._adapters = adapters
        self._reclaimer = reclaimer
        self._drains = drains
        self._lookahead = lookahead
        self._without_room: Sequence | None = None  # waits, and so does its adapter's load

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether the weights that a waiting sequence needs are there for it."""
        for image in sequence.members:
            if not self._adapters.is_resident(image.digest):
                return False
        return not self._drains.holds_back(sequence)

    def holds_up(self, sequence: Sequence) -> bool:
        """Whether one before it, passed as often as may be, waits for its adapter to find room."""
        holder = self._without_room
        if holder is None or holder.status is not Status.WAITING:
            return False
        return self._waiting.is_overdue(holder) and self._waiting.precedes(holder, sequence)

    def load(self, has_room: bool, num_spare: int) -> None:
        """Load what the queue's front needs, in its order, unless a sequence waits for pages.

        Leaves `num_spare` pages to be had for what runs.
        """
        wanted: set[str] = set()
        self._without_room = None
        for sequence in self._waiting.first(self._lookahead):
            new = [image for image in sequence.members if image.digest not in wanted]
            if not new or self._drains.holds_back(sequence):
                continue
            # All of a combination at once: no member makes room for another.
            wanted.update(image.digest for image in new)
            missing = [image for image in new if not self._adapters.is_resident(image.digest)]
            if missing and not (has_room and self._begin(sequence, missing, wanted, num_spare)):
                break
        self.wanted = frozenset(wanted)

    def give_up(self, sequence: Sequence) -> None:
        """It has left the queue: end the loads for which it was the last to wait."""
        for image in sequence.members:
            is_loading = self._adapters.is_loading(image.digest)
            if is_loading and self._waiting.num_waiting_for(image.digest) == 0:
                self._adapters.cancel(image.digest)

    def _begin(
        self, sequence: Sequence, missing: list[AdapterImage], keep: set[str], num_spare: int
    ) -> bool:
        """Start the loads of one that waits; False when one of them has to wait, too."""
        for image in missing:
            if self._adapters.num_loading >= MAX_LOADING:
                return False
            if not self._reclaimer.load(image, keep=keep, num_spare=num_spare):
                # Behind it nothing is loaded: that would take the room first.
                self._without_room = sequence
                return False
        return True
