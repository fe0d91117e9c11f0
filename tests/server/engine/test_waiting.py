"""The order in which requests wait."""

from __future__ import annotations

import pytest

from server.engine.request import Sampling, Submit
from server.engine.sequence import Sequence
from server.engine.waiting import WaitingQueue


def sequence(arrival: int) -> Sequence:
    request = Submit(
        request_id=f"r{arrival}", prompt_token_ids=(1,), sampling=Sampling(max_tokens=1)
    )
    return Sequence(request, arrival)


def order(queue: WaitingQueue) -> list[int]:
    queue.check()
    return [each.arrival for each in queue]


def test_preempted_ones_stand_before_new_ones_and_both_in_order_of_arrival():
    queue = WaitingQueue()
    for arrival in (4, 5):
        queue.submit(sequence(arrival))
    for arrival in (3, 1, 2):
        queue.requeue(sequence(arrival))
    assert order(queue) == [1, 2, 3, 4, 5]
    assert [each.arrival for each in queue.first(4)] == [1, 2, 3, 4]
    assert len(queue) == 5


def test_a_sequence_leaves_from_wherever_it_stands():
    queue = WaitingQueue()
    new, preempted = [sequence(i) for i in (3, 4, 5)], [sequence(i) for i in (0, 1)]
    for each in new:
        queue.submit(each)
    for each in preempted:
        queue.requeue(each)
    queue.remove(new[1])
    queue.remove(preempted[0])
    assert order(queue) == [1, 3, 5]


def test_a_sequence_that_does_not_wait_cannot_be_removed():
    with pytest.raises(ValueError, match="not in list"):
        WaitingQueue().remove(sequence(0))


def test_check_finds_a_sequence_that_waits_twice():
    queue = WaitingQueue()
    twice = sequence(0)
    queue.submit(twice)
    queue.requeue(twice)
    with pytest.raises(AssertionError, match="twice"):
        queue.check()
