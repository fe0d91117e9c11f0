"""Virtual token counters: what each tenant was served, and with that whose turn it is.

The virtual token counter of arXiv:2401.00588. Knows tenants by name, no requests and no clock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.sequence import Sequence

INPUT_COST = 1
"""Of a prompt token that has to be computed, charged when its sequence is admitted."""

OUTPUT_COST = 2
"""Of a generated token, charged when it is accepted."""

MAX_FORGETTABLE = 1024
"""Tenants known before those that nobody would miss are forgotten."""


@dataclass(slots=True)
class Backlog:
    """What some waiting requests ask for."""

    num_sequences: int = 0
    num_prompt_tokens: int = 0
    max_tokens: int = 0  # generated, together, at most

    def add(self, sequence: Sequence) -> None:
        self.num_sequences += 1
        self.num_prompt_tokens += sequence.num_prompt
        self.max_tokens += sequence.request.sampling.max_tokens

    def subtract(self, sequence: Sequence) -> None:
        """Take back one `add`."""
        self.num_sequences -= 1
        self.num_prompt_tokens -= sequence.num_prompt
        self.max_tokens -= sequence.request.sampling.max_tokens

    def cost(self, usual_output: float) -> float:
        """What serving it will cost, if a request generates `usual_output` tokens or its limit."""
        num_output_tokens = min(self.max_tokens, self.num_sequences * usual_output)
        return INPUT_COST * self.num_prompt_tokens + OUTPUT_COST * num_output_tokens


class VirtualCounters:
    """The service of each tenant so far, divided by its weight; the least served goes next.

    A tenant that has nothing waiting at a priority and submits there is lifted to the least
    counter of those that wait at it, or to that of the last tenant that left if there are none:
    what it did not use while it was away is not owed to it (algorithm 2, lines 6 to 16).

    So between two tenants that both have requests waiting all the time, the services differ by at
    most 2·max(INPUT_COST · longest prompt, OUTPUT_COST · tokens that run at once), for weights of
    1 and one priority (theorem 4.4), as long as the bound on passes of `WaitingQueue` does not
    bind. Counters only grow, which is what heaps of outdated keys rely on.
    """

    def __init__(self) -> None:
        self.num_input_tokens = 0
        self.num_output_tokens = 0
        self.num_admissions = 0
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._waiting: dict[int, dict[str, int]] = {}  # by priority: requests of each tenant
        # By priority: (a lower bound of its counter, tenant), one for each key of _waiting.
        self._heaps: dict[int, list[tuple[float, str]]] = {}
        self._last_left: str | None = None
        self._num_tolerated = MAX_FORGETTABLE

    def __getitem__(self, tenant: str) -> float:
        """What it was served, or was lifted to; 0 for one that is not known."""
        return self._counters.get(tenant, 0.0)

    def __len__(self) -> int:
        return len(self._counters)

    @property
    def cost(self) -> int:
        """All service so far, whatever the weights."""
        return INPUT_COST * self.num_input_tokens + OUTPUT_COST * self.num_output_tokens

    def enter(self, tenant: str, priority: int) -> None:
        """One more of its requests waits at `priority`; lifts the tenant if it is the first."""
        waiting = self._waiting.setdefault(priority, {})
        if not waiting.get(tenant):
            self._counters[tenant] = self.lifted(tenant, priority)
            if tenant not in waiting:
                heap = self._heaps.setdefault(priority, [])
                heappush(heap, (self._counters[tenant], tenant))
        waiting[tenant] = waiting.get(tenant, 0) + 1
        if len(self._counters) > self._num_tolerated:
            self._forget_the_settled()

    def leave(self, tenant: str, priority: int) -> None:
        """One of its requests waits no longer."""
        self._waiting[priority][tenant] -= 1
        if not self._waiting[priority][tenant]:
            self._last_left = tenant

    def lifted(self, tenant: str, priority: int) -> float:
        """Its counter once it has a request waiting at `priority`."""
        own = self[tenant]
        if self._waiting.get(priority, {}).get(tenant):
            return own
        return max(own, self._least(priority))

    def charge_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        """An admitted sequence has to have `num_tokens` computed that were not charged before."""
        self.num_admissions += 1
        self.num_input_tokens += num_tokens
        self._counters[sequence.tenant] += INPUT_COST * num_tokens / sequence.request.weight

    def charge_token(self, sequence: Sequence) -> None:
        """A sequence was given a token."""
        self.num_output_tokens += 1
        self._counters[sequence.tenant] += OUTPUT_COST / sequence.request.weight

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        for priority, waiting in self._waiting.items():
            heap = self._heaps[priority]
            assert sorted(tenant for _, tenant in heap) == sorted(waiting)
            assert all(bound <= self._counters[tenant] for bound, tenant in heap if waiting[tenant])
            assert all(number >= 0 for number in waiting.values())

    def _least(self, priority: int) -> float:
        """Least counter of the tenants that wait at `priority`; of the last that left if none."""
        heap, waiting = self._heaps.get(priority, []), self._waiting.get(priority, {})
        while heap:
            bound, tenant = heap[0]
            if not waiting[tenant]:
                heappop(heap)
                del waiting[tenant]
            elif bound < self._counters[tenant]:
                heapreplace(heap, (self._counters[tenant], tenant))
            else:
                return bound
        return 0.0 if self._last_left is None else self[self._last_left]

    def _forget_the_settled(self) -> None:
        """Forget the tenants that are away and that any lift would raise."""
        least = min(self._least(priority) for priority in self._heaps)
        waiting = {tenant for tenants in self._waiting.values() for tenant in tenants}
        waiting.add(self._last_left or "")
        for tenant, counter in list(self._counters.items()):
            if counter <= least and tenant not in waiting:
                del self._counters[tenant]
        self._num_tolerated = 2 * len(self._counters) + MAX_FORGETTABLE
