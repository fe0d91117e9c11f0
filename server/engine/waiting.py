"""The order of the requests that are not admitted: by priority and service, within a bound.

Knows adapters as names of what a request may wait for, and no pages.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from server.engine.fairness import Backlog, VirtualCounters
from server.engine.fronts import Front, Line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from server.engine.sequence import Sequence

PREEMPTED = -(1 << 30)
"""The priority of preempted sequences, before all that a request may ask for."""


@dataclass(slots=True)
class _Wanted:
    """The lines that wait for one adapter, in combinations too, or for none."""

    lines: dict[Line, None] = field(default_factory=dict)  # an ordered set
    num_sequences: int = 0


class WaitingQueue:
    """Gives the next request to admit at a cost that does not grow with how many wait.

    The requests of one tenant, priority and adapter form a line, in order of arrival; its first
    one is a head. Order: preempted sequences, oldest first; then heads by priority, their
    tenants' virtual counters, arrival. A line whose head cannot run, since its adapter is not
    resident, is parked: it is not in the way of the others.

    **Bound.** Heads take turns, numbered from 0, when they come to the front of their lines. A
    head that can run is passed by at most `max_passes` + w heads of later turns, where w counts
    the heads of earlier turns that were parked or gave up meanwhile: each lends its turn to one
    other. Preempted sequences are apart: they were admitted before.

    Proof. Let D be the number of heads admitted so far, and o the oldest head that can run, of
    turn t. The t heads of earlier turns were admitted, except w that are parked or gave up; so
    D = t − w + p, where p heads of later turns have passed o. `next` gives o as soon as
    D − t ≥ max_passes, so when it gives another, p = D − t + w < max_passes + w, and p ≤
    max_passes + w after it. Whatever passes a younger head that can run passes o, too. ∎

    A request that finds its line empty takes its turn on arrival, so that "of later turns" means
    "that came later". One with k before it in its line is passed by at most (k + 1)·(max_passes +
    w) + k·n requests that came later, n being the most lines that wait beside its own: for each
    of the k + 1 turns of its line by those of later turns, and at each but the first by the up to
    n heads that had taken theirs before, although they came later.
    """

    def __init__(self, counters: VirtualCounters, max_passes: int) -> None:
        self.backlog = Backlog()  # of all that wait
        self._counters = counters
        self._max_passes = max_passes
        self._lines: dict[tuple[int, str, str | None], Line] = {}
        self._line_of: dict[str, Line] = {}  # by request_id
        self._wanted: dict[str | None, _Wanted] = {}
        self._ready, self._parked = Front(counters), Front(counters)
        self._num_turns = 0
        self._num_admitted = 0
        self._stamps = count()

    def __len__(self) -> int:
        return len(self._line_of)

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order."""
        for line in self._lines.values():
            yield from line.sequences.values()

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of that id, if it waits."""
        line = self._line_of.get(request_id)
        return None if line is None else line.sequences[request_id]

    # In and out.

    def submit(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of its line."""
        priority = sequence.request.priority
        self._counters.enter(sequence.tenant, priority)
        self._add(sequence, priority, sequence.tenant)

    def requeue(self, sequence: Sequence) -> None:
        """Put a preempted sequence before all that never ran, behind older preempted ones."""
        self._add(sequence, PREEMPTED, sequence.request_id)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands. Raises KeyError unless it is in the queue."""
        line = self._line_of.pop(sequence.request_id)
        was_head = line.head is sequence
        del line.sequences[sequence.request_id]
        self.backlog.subtract(sequence)
        line.backlog.subtract(sequence)
        for digest in sequence.digests:
            self._wanted[digest].num_sequences -= 1
        if line.priority != PREEMPTED:
            self._counters.leave(line.tenant, line.priority)
        if not line.sequences:
            self._front_of(line).discard(line)
            for digest in sequence.digests:
                del self._wanted[digest].lines[line]
                if not self._wanted[digest].lines:
                    del self._wanted[digest]
            del self._lines[line.key]
        elif was_head:
            line.turn = self._new_turn()
            self._front_of(line).add_turn(line)

    def admit(self, sequence: Sequence) -> None:
        """Take out a sequence that is going to run; raises as `remove`."""
        if self._line_of[sequence.request_id].priority != PREEMPTED:
            self._num_admitted += 1
        self.remove(sequence)

    def park(self, sequence: Sequence) -> None:
        """Put the line of a head that cannot run out of the way, until `unpark` of its adapter."""
        self._move(self._line_of[sequence.request_id], is_parked=True)

    def unpark(self, digest: str) -> None:
        """An adapter is resident: its requests can run, unless they need another one, too."""
        for line in self._lines_for(digest):
            if line.is_parked:
                self._move(line, is_parked=False)

    def is_parked(self, sequence: Sequence) -> bool:
        """Whether it is the head of a line that is parked."""
        line = self._line_of[sequence.request_id]
        return line.is_parked and line.head is sequence

    # Who is next.

    def next(self) -> Sequence | None:
        """The sequence to admit next, of those that are not parked; it stays in the queue."""
        line = self._ready.first()
        if line is None:
            return None
        if line.priority != PREEMPTED:
            oldest = self._ready.oldest()
            if oldest is not None and self._is_due(oldest):
                line = oldest
        return line.head

    def first(self, num_lines: int) -> list[Sequence]:
        """The heads at the front, parked ones too, in their order; they stay in the queue."""
        lines = {
            line for front in (self._ready, self._parked)
            for line in front.front(num_lines, self._is_due)
        }  # fmt: skip
        return [line.head for line in sorted(lines, key=self._place)[:num_lines]]

    def is_overdue(self, sequence: Sequence) -> bool:
        """Whether a head has been passed as often as may be, or was preempted."""
        line = self._line_of[sequence.request_id]
        return line.head is sequence and self._place(line)[0] < 2

    def precedes(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether the one head goes before the other."""
        lines = self._line_of
        return self._place(lines[sequence.request_id]) < self._place(lines[other.request_id])

    # What waits.

    def waiting_for(self, digest: str | None) -> list[Sequence]:
        """All that need an adapter, in a combination too; None = those of the base model."""
        return [s for line in self._lines_for(digest) for s in line.sequences.values()]

    def num_waiting_for(self, digest: str | None) -> int:
        """How many need an adapter, in a combination too; None = of the base model."""
        wanted = self._wanted.get(digest)
        return 0 if wanted is None else wanted.num_sequences

    def cost_before(self, sequence: Sequence, usual_output: float) -> float:
        """Expected cost of what goes before a new sequence that is not in the queue yet.

        All of better priority, and of its own priority what others are served until its tenant's
        counter has grown by what that tenant has waiting; parked lines left out. See `Backlog` for
        `usual_output`. Takes time in the number of lines.
        """
        request, tenant = sequence.request, sequence.tenant
        backlogs: dict[str, float] = {}
        weights: dict[str, float] = {tenant: request.weight}
        cost = 0.0
        for line in self._lines.values():
            if line.is_parked or line.priority > request.priority:
                continue
            expected = line.backlog.cost(usual_output)
            if line.priority < request.priority:
                cost += expected
            else:
                backlogs[line.tenant] = backlogs.get(line.tenant, 0.0) + expected
                weights.setdefault(line.tenant, line.head.request.weight)
        own = backlogs.pop(tenant, 0.0)
        reached = self._counters.lifted(tenant, request.priority) + own / request.weight
        for other, backlog in backlogs.items():
            owed = max(0.0, reached - self._counters[other]) * weights[other]
            cost += min(backlog, owed)
        return cost + own

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        self._counters.check()
        ids = [sequence.request_id for sequence in self]
        assert len(set(ids)) == len(ids) == len(self._line_of), "a sequence waits twice"
        turns = [line.turn for line in self._lines.values() if line.priority != PREEMPTED]
        assert len(set(turns)) == len(turns), "two heads have one turn"
        for key, line in self._lines.items():
            assert line.key == key
            arrivals = [sequence.arrival for sequence in line.sequences.values()]
            assert arrivals, "an empty line"
            assert arrivals == sorted(arrivals), "a line is out of order"
            assert all(self._line_of[request_id] is line for request_id in line.sequences)
            assert all(line in self._wanted[digest].lines for digest in line.head.digests)
            self._front_of(line).check(line)
        assert self.backlog.num_sequences == len(ids)
        assert self.backlog.num_prompt_tokens == sum(sequence.num_prompt for sequence in self)
        for digest, wanted in self._wanted.items():
            assert wanted.num_sequences == len(self.waiting_for(digest)) > 0

    def _add(self, sequence: Sequence, priority: int, tenant: str) -> None:
        assert sequence.request_id not in self._line_of, "a sequence waits twice"
        digest = sequence.wanted_digest
        for each in sequence.digests:
            self._wanted.setdefault(each, _Wanted()).num_sequences += 1
        self.backlog.add(sequence)
        line = self._lines.get((priority, tenant, digest))
        if line is not None:
            line.sequences[sequence.request_id] = sequence
        else:
            waiting = OrderedDict([(sequence.request_id, sequence)])
            line = Line(priority, tenant, digest, waiting, stamp=next(self._stamps))
            if priority != PREEMPTED:
                line.turn = self._new_turn()
            self._lines[line.key] = line
            for each in sequence.digests:
                self._wanted[each].lines[line] = None
            self._ready.add(line)
        line.backlog.add(sequence)
        self._line_of[sequence.request_id] = line

    def _lines_for(self, digest: str | None) -> Iterable[Line]:
        wanted = self._wanted.get(digest)
        return () if wanted is None else wanted.lines

    def _new_turn(self) -> int:
        self._num_turns += 1
        return self._num_turns - 1

    def _move(self, line: Line, *, is_parked: bool) -> None:
        self._front_of(line).discard(line)
        line.is_parked, line.stamp = is_parked, next(self._stamps)
        self._front_of(line).add(line)

    def _front_of(self, line: Line) -> Front:
        return self._parked if line.is_parked else self._ready

    def _is_due(self, line: Line) -> bool:
        return line.turn is not None and self._num_admitted - line.turn >= self._max_passes

    def _place(self, line: Line) -> tuple[int, int, tuple[int, float, int]]:
        """What heads are ordered by: preempted ones, those that are due by turn, the others."""
        order = line.order(self._counters)
        if line.turn is None:
            return 0, 0, order
        return (1, line.turn, order) if self._is_due(line) else (2, 0, order)
