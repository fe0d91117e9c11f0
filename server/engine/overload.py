"""What is refused instead of waiting in vain: full queues, deadlines, waits that are known ahead.

Knows costs and a clock, no pages and no adapters' states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from server.engine.endings import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.engine.fairness import VirtualCounters
    from server.engine.sequence import Sequence
    from server.engine.waiting import WaitingQueue

MEMORY_SECONDS = 10.0
"""What was served so long ago counts 1/e of what is served now."""

EVIDENCE_SECONDS = 1.0
"""Saturated time that has to be seen before a wait is estimated."""

MAX_RETRY_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Requests that may wait at once; None = any number. Those that run are not counted."""

    max_queue: int | None = None
    max_queue_per_adapter: int | None = None  # and of the base model


class ServiceRate:
    """Cost served a second, and tokens generated for an admission, while the server is saturated.

    Other time does not count: what is served then is what was asked for, not what can be served.
    """

    def __init__(self, counters: VirtualCounters) -> None:
        self._counters = counters
        self._last: tuple[float, int, int, int] | None = None  # None = it was not saturated then
        self._seconds = self._cost = self._num_output_tokens = self._num_admissions = 0.0

    def observe(self, now: float, *, is_saturated: bool) -> None:
        """Take in what was served since the last call; `now` in seconds."""
        counters = self._counters
        reading = (now, counters.cost, counters.num_output_tokens, counters.num_admissions)
        if self._last is not None and is_saturated:
            seconds, cost, num_output_tokens, num_admissions = (
                new - old for new, old in zip(reading, self._last, strict=True)
            )
            kept = math.exp(-seconds / MEMORY_SECONDS)
            self._seconds = kept * self._seconds + seconds
            self._cost = kept * self._cost + cost
            self._num_output_tokens = kept * self._num_output_tokens + num_output_tokens
            self._num_admissions = kept * self._num_admissions + num_admissions
        self._last = reading if is_saturated else None

    @property
    def usual_output(self) -> float:
        """Tokens that a request generates, as seen lately; 0 before the first."""
        return self._num_output_tokens / max(1.0, self._num_admissions)

    def seconds_for(self, cost: float) -> float | None:
        """How long serving `cost` takes; None while too little was seen, or nothing served."""
        if self._seconds < EVIDENCE_SECONDS or self._cost <= 0:
            return None
        return cost * self._seconds / self._cost


class Overload:
    """Says which requests are not to wait: at once where that is known, else at their deadline."""

    def __init__(
        self,
        queue: WaitingQueue,
        counters: VirtualCounters,
        limits: QueueLimits,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds that never go back."""
        self._queue = queue
        self._rate = ServiceRate(counters)
        self._limits = limits
        self._clock = clock
        self._deadlines: list[tuple[float, int, str]] = []  # time, arrival, request_id

    def meet(self, sequence: Sequence) -> Fault | None:
        """Why a new request should not wait; None, and its deadline is kept, if it may."""
        refusal = self._full(sequence) or self._hopeless(sequence)
        timeout = sequence.request.queue_timeout
        if refusal is None and timeout is not None:
            deadline = self._clock() + timeout
            heappush(self._deadlines, (deadline, sequence.arrival, sequence.request_id))
        return refusal

    def observe(self) -> None:
        """Take in what was served lately; called when a step has taken what it can of the queue."""
        self._rate.observe(self._clock(), is_saturated=self._queue.next() is not None)

    def expired(self) -> list[tuple[Sequence, Fault]]:
        """The requests that were never admitted by their deadlines; called before each step."""
        now = self._clock()
        if len(self._deadlines) > 2 * len(self._queue) + 64:
            self._deadlines = [each for each in self._deadlines if self._waiting(each)]
            heapify(self._deadlines)
        late: list[tuple[Sequence, Fault]] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self._waiting(heappop(self._deadlines))
            if sequence is not None:
                late.append((sequence, self._expiry(sequence)))
        return late

    def _waiting(self, deadline: tuple[float, int, str]) -> Sequence | None:
        """Whose deadline it is, if it was never admitted and waits."""
        _, arrival, request_id = deadline
        sequence = self._queue.find(request_id)
        if sequence is None or sequence.arrival != arrival or sequence.num_preemptions:
            return None
        return sequence

    def _full(self, sequence: Sequence) -> Fault | None:
        digest = sequence.wanted_digest
        whose = "the base model" if digest is None else "this adapter"
        for name, limit, number, what in (
            ("max_queue", self._limits.max_queue, len(self._queue), "requests"),
            (
                "max_queue_per_adapter",
                self._limits.max_queue_per_adapter,
                self._queue.num_waiting_for(digest),
                f"requests for {whose}",
            ),
        ):
            if limit is not None and number >= limit:
                text = f"{number} {what} wait, {name} is {limit}: send the request again later"
                return Fault(text, "queue_full")
        return None

    def _hopeless(self, sequence: Sequence) -> Fault | None:
        """Refuse what would wait beyond its deadline, by what goes before it."""
        timeout = sequence.request.queue_timeout
        if timeout is None:
            return None
        rate = self._rate
        longest = rate.seconds_for(self._queue.backlog.cost(rate.usual_output))
        if longest is None or longest <= timeout:
            return None
        seconds = rate.seconds_for(self._queue.cost_before(sequence, rate.usual_output))
        if seconds is None or seconds <= timeout:
            return None
        text = (
            f"the request would wait about {math.ceil(seconds)} s and may wait {timeout:g} s "
            "(queue_timeout): send it again later, or let it wait longer"
        )
        return Fault(text, "queue_timeout", _retry_after(seconds))

    def _expiry(self, sequence: Sequence) -> Fault:
        text = (
            f"the request was not admitted within {sequence.request.queue_timeout:g} s "
            "(queue_timeout): send it again later, or let it wait longer"
        )
        seconds = self._rate.seconds_for(self._queue.backlog.cost(self._rate.usual_output))
        return Fault(text, "queue_timeout", None if seconds is None else _retry_after(seconds))


def _retry_after(seconds: float) -> int:
    return min(max(1, math.ceil(seconds)), MAX_RETRY_SECONDS)
