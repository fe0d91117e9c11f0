"""The order of the requests that are not admitted: preempted ones first, then as submitted.

Knows no adapters and no pages.
"""

from __future__ import annotations

from bisect import insort
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.engine.sequence import Sequence


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class WaitingQueue:
    """A queue that gives and takes at the cost of what it gives and takes, however long it is.

    Invariant: each sequence is in it once; both parts are in the order of arrival.
    """

    def __init__(self) -> None:
        self._preempted: list[Sequence] = []  # at most as many as can run at once
        self._submitted: dict[str, Sequence] = {}  # by request_id, in order of arrival

    def __len__(self) -> int:
        return len(self._preempted) + len(self._submitted)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._preempted, self._submitted.values())

    def first(self, num_sequences: int) -> list[Sequence]:
        """The sequences at the front, in their order; they stay in the queue."""
        return list(islice(self, num_sequences))

    def submit(self, sequence: Sequence) -> None:
        """Put a new sequence at the end."""
        self._submitted[sequence.request_id] = sequence

    def requeue(self, sequence: Sequence) -> None:
        """Put a preempted sequence before all that never ran, behind older preempted ones."""
        insort(self._preempted, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands. Raises ValueError unless it is in the queue."""
        if self._submitted.pop(sequence.request_id, None) is None:
            self._preempted.remove(sequence)

    def check(self) -> None:
        """Recompute the invariant; AssertionError when it does not hold."""
        ids = [sequence.request_id for sequence in self]
        assert len(set(ids)) == len(ids), "a sequence waits twice"
        for part in (self._preempted, list(self._submitted.values())):
            arrivals = [sequence.arrival for sequence in part]
            assert arrivals == sorted(arrivals), "the queue is out of order"
