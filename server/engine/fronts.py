"""Lines of waiting requests, found by their order and by their turn without sorting them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING

from server.engine.fairness import Backlog

if TYPE_CHECKING:
    from collections import OrderedDict
    from collections.abc import Callable

    from server.engine.fairness import VirtualCounters
    from server.engine.sequence import Sequence

Order = tuple[int, float, int]
"""Priority, the tenant's virtual counter, arrival; the least goes first."""


@dataclass(slots=True, eq=False)
class Line:
    """The waiting requests of one tenant, priority and adapter; changed by `WaitingQueue`.

    If its head cannot run, none of it can. The order of a line only grows: its tenant's counter
    does, and a later head arrived later.
    """

    priority: int
    tenant: str
    digest: str | None
    sequences: OrderedDict[str, Sequence]  # by request_id, in order of arrival
    stamp: int  # entries of heaps with another one are outdated
    turn: int | None = None  # of its head; None = preempted
    backlog: Backlog = field(default_factory=Backlog)
    is_parked: bool = False

    @property
    def key(self) -> tuple[int, str, str | None]:
        return self.priority, self.tenant, self.digest

    @property
    def head(self) -> Sequence:
        return next(iter(self.sequences.values()))

    def order(self, counters: VirtualCounters) -> Order:
        """Where its head stands; a preempted line has no counter."""
        counter = 0.0 if self.turn is None else counters[self.tenant]
        return self.priority, counter, self.head.arrival


class Front:
    """Some lines: the one that is first in order, and the one whose head has the oldest turn.

    Two heaps of entries that may be outdated. One whose stamp is not its line's is dropped when
    it is met; an order that was pushed is a lower bound of the line's, and is renewed when met.
    """

    def __init__(self, counters: VirtualCounters) -> None:
        self._counters = counters
        self._lines: set[Line] = set()
        self._by_order: list[tuple[Order, int, Line]] = []
        self._by_turn: list[tuple[int, int, Line]] = []

    def add(self, line: Line) -> None:
        """Put a line in, with a stamp that it never had here."""
        self._lines.add(line)
        if line.turn is not None:
            self.add_turn(line)
        heappush(self._by_order, (line.order(self._counters), line.stamp, line))
        if len(self._by_order) > 2 * len(self._lines) + 64:
            self._by_order = [e for e in self._by_order if self._has(e[2], e[1])]
            heapify(self._by_order)

    def add_turn(self, line: Line) -> None:
        """The head of a line of this front has taken its turn."""
        assert line.turn is not None
        heappush(self._by_turn, (line.turn, line.stamp, line))
        if len(self._by_turn) > 2 * len(self._lines) + 64:
            self._by_turn = [e for e in self._by_turn if self._is_current(e)]
            heapify(self._by_turn)

    def discard(self, line: Line) -> None:
        """Take a line out."""
        self._lines.discard(line)

    def first(self) -> Line | None:
        """The line that is first in order."""
        heap = self._by_order
        while heap:
            bound, stamp, line = heap[0]
            if not self._has(line, stamp):
                heappop(heap)
            elif bound < (order := line.order(self._counters)):
                heapreplace(heap, (order, stamp, line))
            else:
                return line
        return None

    def oldest(self) -> Line | None:
        """The line whose head has the oldest turn; preempted ones have none."""
        heap = self._by_turn
        while heap and not self._is_current(heap[0]):
            heappop(heap)
        return heap[0][2] if heap else None

    def front(self, num_lines: int, is_due: Callable[[Line], bool]) -> list[Line]:
        """The lines that are due, by turn, and those that are first in order, so many of each.

        Due are those whose turns lie before some turn.
        """
        found: list[Line] = []
        turns: list[tuple[int, int, Line]] = []
        while len(turns) < num_lines and (line := self.oldest()) is not None and is_due(line):
            found.append(line)
            turns.append(heappop(self._by_turn))
        orders: list[tuple[Order, int, Line]] = []
        while len(orders) < num_lines and (line := self.first()) is not None:
            found.append(line)
            orders.append(heappop(self._by_order))
        for turn in turns:
            heappush(self._by_turn, turn)
        for order in orders:
            heappush(self._by_order, order)
        return found

    def check(self, line: Line) -> None:
        """Whether a line that is here can be found; AssertionError if not."""
        assert line in self._lines
        bounds = [o for o, stamp, each in self._by_order if each is line and stamp == line.stamp]
        assert len(bounds) == 1, "a line stands in the order not once"
        assert bounds[0] <= line.order(self._counters), "a line's order has shrunk"
        turns = [entry for entry in self._by_turn if entry[2] is line and self._is_current(entry)]
        assert len(turns) == (line.turn is not None), "a head's turn is not there once"

    def _has(self, line: Line, stamp: int) -> bool:
        return stamp == line.stamp and line in self._lines

    def _is_current(self, entry: tuple[int, int, Line]) -> bool:
        turn, stamp, line = entry
        return turn == line.turn and self._has(line, stamp)
