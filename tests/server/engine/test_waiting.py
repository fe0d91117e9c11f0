"""The order in which requests wait, and how often one is passed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import VirtualCounters
from server.engine.request import AdapterImage, Sampling, Submit
from server.engine.sequence import Sequence
from server.engine.waiting import WaitingQueue


def sequence(arrival: int, digest: str | None = None, **fields) -> Sequence:
    request = Submit(
        request_id=f"r{arrival}",
        prompt_token_ids=(1,),
        sampling=Sampling(max_tokens=1),
        adapter=None if digest is None else AdapterImage(digest, "1"),
        **fields,
    )
    return Sequence(request, arrival)


def queue_of(*waiting: Sequence, max_passes: int = 64) -> WaitingQueue:
    queue = WaitingQueue(VirtualCounters(), max_passes)
    for each in waiting:
        queue.submit(each)
    return queue


def emptied(queue: WaitingQueue) -> list[int]:
    """Arrivals in the order of admission."""
    order = []
    while (first := queue.next()) is not None:
        queue.check()
        queue.admit(first)
        order.append(first.arrival)
    return order


def charge(queue: WaitingQueue, tenant: str, num_tokens: int) -> None:
    queue._counters.charge_prompt(sequence(0, tenant=tenant), num_tokens)


def test_requests_of_one_tenant_go_in_order_of_arrival_whatever_their_adapters():
    queue = queue_of(*(sequence(i, digest, tenant="t") for i, digest in enumerate("abcab")))
    assert emptied(queue) == [0, 1, 2, 3, 4]


def test_the_tenant_that_was_served_least_goes_first():
    queue = queue_of(sequence(0, "a"), sequence(1, "b"), sequence(2))
    charge(queue, "a", 9)
    charge(queue, "b", 5)
    assert emptied(queue) == [2, 1, 0]


def test_priority_comes_before_service():
    queue = queue_of(*(sequence(i, priority=p, tenant=str(p)) for i, p in enumerate((1, 0, -1))))
    charge(queue, "-1", 100)
    assert emptied(queue) == [2, 1, 0]


def test_preempted_ones_stand_before_new_ones_in_order_of_arrival():
    queue = queue_of(sequence(4, priority=-100), sequence(5))
    for arrival in (3, 1, 2):
        queue.requeue(sequence(arrival, priority=100))
    assert [each.arrival for each in queue.first(4)] == [1, 2, 3, 4]
    assert len(queue) == 5
    assert emptied(queue) == [1, 2, 3, 4, 5]


def test_a_sequence_leaves_from_wherever_it_stands():
    new, preempted = [sequence(i) for i in (3, 4, 5)], [sequence(i) for i in (0, 1)]
    queue = queue_of(*new)
    for each in preempted:
        queue.requeue(each)
    queue.remove(new[1])
    queue.remove(preempted[0])
    assert (queue.find("r4"), queue.find("r3")) == (None, new[0])
    assert emptied(queue) == [1, 3, 5]


def test_a_sequence_that_does_not_wait_cannot_be_removed():
    with pytest.raises(KeyError):
        queue_of().remove(sequence(0))


def test_a_sequence_cannot_wait_twice():
    queue = queue_of(sequence(0))
    with pytest.raises(AssertionError, match="twice"):
        queue.requeue(sequence(0))


def test_a_parked_line_is_in_nobodys_way_until_its_adapter_is_there():
    cold = [sequence(i, "a") for i in range(2)]
    queue = queue_of(*cold, sequence(2))
    queue.park(cold[0])
    assert queue.next().arrival == 2
    assert [each.arrival for each in queue.first(9)] == [0, 2], "it is still to be loaded first"
    assert [queue.is_parked(each) for each in cold] == [True, False]
    queue.unpark("a")
    assert emptied(queue) == [0, 1, 2]


def test_counts_what_waits_for_each_adapter():
    queue = queue_of(sequence(0, "a"), sequence(1, "a", priority=1), sequence(2, "b"), sequence(3))
    assert [queue.num_waiting_for(digest) for digest in ("a", "b", None, "c")] == [2, 1, 1, 0]
    assert {each.arrival for each in queue.waiting_for("a")} == {0, 1}
    assert queue.waiting_for("c") == []


def test_a_request_alone_in_its_line_is_passed_max_passes_times_by_later_ones():
    queue = queue_of(sequence(0, priority=9), max_passes=3)
    for arrival in range(1, 9):
        queue.submit(sequence(arrival, tenant=f"t{arrival}"))
    assert emptied(queue) == [1, 2, 3, 0, 4, 5, 6, 7, 8]


def test_without_passes_lines_take_turns():
    queue = queue_of(*(sequence(i, tenant="xxyz"[i]) for i in range(4)), max_passes=0)
    charge(queue, "y", 9)
    assert emptied(queue) == [0, 2, 3, 1]


def test_a_parked_head_lends_its_turn_to_one_other():
    cold = sequence(0, "a")
    queue = queue_of(cold, sequence(1, priority=9), max_passes=1)
    queue.park(cold)
    for arrival in range(2, 6):
        queue.submit(sequence(arrival, tenant=f"t{arrival}"))
    assert emptied(queue) == [2, 3, 1, 4, 5]
    assert queue.is_overdue(cold)


def test_the_cost_before_a_request_is_what_fairness_puts_there():
    waiting = [("heavy", 0), ("heavy", 0), ("light", 0), ("urgent", -1), ("late", 1)]
    queue = queue_of(
        *(sequence(i, tenant=t, priority=p) for i, (t, p) in enumerate(waiting)),
        sequence(5, "cold"),
    )
    queue.park(queue.waiting_for("cold")[0])
    charge(queue, "heavy", 2)

    def cost_before(tenant: str, priority: int = 0) -> float:
        return queue.cost_before(sequence(9, tenant=tenant, priority=priority), usual_output=1.0)

    assert cost_before("new") == 3, "the urgent one: 1 token in, 1 out"
    assert cost_before("light") == 3 + 3 + 1, "its own, and what the heavy one is behind"
    assert cost_before("heavy") == 3 + 6 + 3
    assert cost_before("new", priority=2) == 15
    assert cost_before("new", priority=-2) == 0


class Oracle:
    """The queue's contract over plain lists, beside a queue that is driven through everything."""

    def __init__(self, max_passes: int) -> None:
        self.counters = VirtualCounters()
        self.queue = WaitingQueue(self.counters, max_passes)
        self.max_passes = max_passes
        self.waiting: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.resident: set[str | None] = {None}
        self.turns: dict[int, int] = {}  # by arrival of heads, past ones too
        self.num_turns = 0
        self.num_admitted = 0
        self.has_left: set[int] = set()  # admitted heads, by arrival
        self.passes: Counter[int] = Counter()
        self.num_submitted = 0

    def submit(self, tenant: str, digest: str | None, priority: int) -> None:
        new = sequence(self.num_submitted, digest, tenant=tenant, priority=priority)
        self.num_submitted += 1
        self.queue.submit(new)
        self.waiting.append(new)
        self.take_turns()

    def cancel(self, number: int) -> None:
        everything = self.waiting + self.preempted
        if everything:
            gone = everything[number % len(everything)]
            self.queue.remove(gone)
            (self.waiting if gone in self.waiting else self.preempted).remove(gone)
            self.take_turns()

    def load(self, digest: str) -> None:
        self.resident.add(digest)
        self.queue.unpark(digest)

    def evict(self, digest: str) -> None:
        self.resident.discard(digest)

    def preempt(self, number: int) -> None:
        if self.admitted:
            again = self.admitted.pop(number % len(self.admitted))
            self.queue.requeue(again)
            self.preempted.append(again)

    def charge(self, tenant: str, num_tokens: int) -> None:
        charge(self.queue, tenant, num_tokens)

    def admit(self) -> None:
        while (got := self.queue.next()) is not None and not self.can_run(got):
            self.queue.park(got)
        assert got is self.expected()
        if got is None:
            return
        self.queue.admit(got)
        self.admitted.append(got)
        if got in self.preempted:
            self.preempted.remove(got)
            return
        self.waiting.remove(got)
        self.num_admitted += 1
        self.has_left.add(got.arrival)
        turn = self.turns[got.arrival]
        for head in self.heads():
            if self.turns.get(head.arrival, turn) < turn:
                self.passes[head.arrival] += 1
                assert not self.can_run(head) or (
                    self.passes[head.arrival] <= self.max_passes + self.num_lent_before(head)
                ), "passed too often"
        self.take_turns()

    def can_run(self, each: Sequence) -> bool:
        return each.wanted_digest in self.resident

    def heads(self) -> list[Sequence]:
        first: dict[tuple, Sequence] = {}
        for each in self.waiting:
            first.setdefault((each.request.priority, each.tenant, each.wanted_digest), each)
        return list(first.values())

    def take_turns(self) -> None:
        for head in self.heads():
            if head.arrival not in self.turns:
                self.turns[head.arrival] = self.num_turns
                self.num_turns += 1

    def num_lent_before(self, head: Sequence) -> int:
        """Heads of earlier turns that were not admitted and cannot run, or are gone."""
        can_run = {each.arrival for each in self.waiting if self.can_run(each)}
        earlier = {a for a, turn in self.turns.items() if turn < self.turns[head.arrival]}
        return len(earlier - self.has_left - can_run)

    def place(self, head: Sequence) -> tuple:
        if head in self.preempted:
            return 0, head.arrival
        turn = self.turns[head.arrival]
        if self.num_admitted - turn >= self.max_passes:
            return 1, turn
        return 2, head.request.priority, self.counters[head.tenant], head.arrival

    def expected(self) -> Sequence | None:
        able = [each for each in self.preempted + self.heads() if self.can_run(each)]
        return min(able, key=self.place, default=None)

    def check(self) -> None:
        self.queue.check()
        assert set(self.queue) == {*self.waiting, *self.preempted}
        ranked = sorted(self.preempted + self.heads(), key=self.place)
        for num_lines in (1, 3, 99):
            assert self.queue.first(num_lines) == ranked[:num_lines]


tenants, digests = st.sampled_from("stuv"), st.sampled_from("ab")
operation = st.one_of(
    st.tuples(st.just("submit"), tenants, st.none() | digests, st.integers(-1, 1)),
    st.tuples(st.just("submit"), tenants, st.none() | digests, st.just(0)),
    st.tuples(st.just("admit")),
    st.tuples(st.just("admit")),
    st.tuples(st.just("charge"), tenants, st.integers(1, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("preempt"), st.integers(0, 20)),
    st.tuples(st.just("load"), digests),
    st.tuples(st.just("evict"), digests),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operation, max_size=80), st.integers(0, 4))
def test_the_order_and_the_bound_hold_whatever_comes(operations, max_passes):
    oracle = Oracle(max_passes)
    for name, *values in operations:
        getattr(oracle, name)(*values)
        oracle.check()
    for digest in "ab":
        oracle.load(digest)
    while oracle.waiting or oracle.preempted:
        oracle.admit()
    oracle.check()


def test_heaps_stay_as_small_as_the_queue_however_long_it_moves():
    queue = queue_of(sequence(0, "cold", priority=100))
    queue.park(queue.next())
    for arrival in range(1, 2000):
        each = sequence(arrival, "hot", tenant=f"t{arrival}")
        queue.submit(each)
        queue.park(each)
        queue.unpark("hot")
        queue.admit(queue.next())
    for front in (queue._ready, queue._parked):
        assert len(front._by_order) + len(front._by_turn) < 150
