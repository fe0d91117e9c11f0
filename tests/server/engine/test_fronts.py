"""Lines are found by order and by turn, though their keys change behind the heaps' backs."""

from __future__ import annotations

from collections import OrderedDict

import pytest

from server.engine.fairness import VirtualCounters
from server.engine.fronts import Front, Line
from server.engine.request import Sampling, Submit
from server.engine.sequence import Sequence


def sequence(arrival: int, tenant: str) -> Sequence:
    request = Submit(
        request_id=f"r{arrival}",
        prompt_token_ids=(1,),
        sampling=Sampling(max_tokens=1),
        tenant=tenant,
    )
    return Sequence(request, arrival)


def line(arrival: int, tenant: str, turn: int | None = None, priority: int = 0) -> Line:
    waiting = OrderedDict([(f"r{arrival}", sequence(arrival, tenant))])
    return Line(priority, tenant, None, waiting, stamp=arrival, turn=turn)


def test_the_first_in_order_follows_the_counters():
    counters = VirtualCounters()
    front = Front(counters)
    a, b = line(0, "a", turn=0), line(1, "b", turn=1)
    for each in (a, b):
        front.add(each)
    assert front.first() is a
    counters.charge_prompt(a.head, 1)
    assert front.first() is b
    counters.charge_prompt(b.head, 1)
    assert front.first() is a, "equal counters: the earlier arrival"


def test_the_oldest_turn_is_another_matter_than_the_order():
    front = Front(VirtualCounters())
    late, early = line(0, "a", turn=5), line(1, "b", turn=2, priority=9)
    for each in (late, early):
        front.add(each)
    assert (front.first(), front.oldest()) == (late, early)
    early.turn = 7
    front.add_turn(early)
    assert front.oldest() is late


def test_preempted_lines_have_no_turn():
    front = Front(VirtualCounters())
    front.add(line(0, "r0"))
    assert front.oldest() is None
    assert front.first().tenant == "r0"


def test_a_line_that_left_is_found_no_more():
    front = Front(VirtualCounters())
    gone, here = line(0, "a", turn=0), line(1, "b", turn=1)
    for each in (gone, here):
        front.add(each)
    front.discard(gone)
    assert (front.first(), front.oldest()) == (here, here)
    front.discard(here)
    assert (front.first(), front.oldest()) == (None, None)


def test_the_front_gives_due_lines_and_the_first_in_order_and_keeps_them():
    front = Front(VirtualCounters())
    lines = [line(i, str(i), turn=9 - i) for i in range(10)]
    for each in lines:
        front.add(each)
    for _ in range(2):
        found = front.front(3, is_due=lambda each: each.turn < 2)
        assert found == [lines[9], lines[8], lines[0], lines[1], lines[2]]
    for each in lines:
        front.check(each)


def test_check_finds_a_line_whose_order_has_shrunk():
    counters = VirtualCounters()
    front, each = Front(counters), line(0, "a", turn=0)
    counters.charge_prompt(each.head, 5)
    front.add(each)
    counters._counters["a"] = 1.0
    with pytest.raises(AssertionError, match="shrunk"):
        front.check(each)
