"""Full queues, deadlines, and waits that are foreseen."""

from __future__ import annotations

import pytest

from server.engine.overload import EVIDENCE_SECONDS, QueueLimits

STEP_SECONDS = 0.1


def run_for(sim, num_steps: int) -> None:
    for _ in range(num_steps):
        sim.now += STEP_SECONDS
        sim.step()


def test_a_request_beyond_max_queue_is_refused_and_names_the_limit(simulate):
    sim = simulate(max_num_seqs=1, queue_limits=QueueLimits(max_queue=2))
    for i in range(2):
        sim.submit(f"r{i}")
    sim.submit("third")
    end = sim.finished["third"]
    assert (end.reason, end.error_code) == ("error", "queue_full")
    assert end.error == "2 requests wait, max_queue is 2: send the request again later"
    sim.step()
    sim.submit("later")
    sim.run()
    assert {sim.finished[i].reason for i in ("r0", "r1", "later")} == {"length"}


def test_one_adapters_full_queue_leaves_the_others_theirs(simulate, image):
    sim = simulate(max_num_seqs=1, queue_limits=QueueLimits(max_queue_per_adapter=1))
    for request_id, name in (("a0", "a"), ("a1", "a"), ("b0", "b"), ("base0", None)):
        sim.submit(request_id, adapter=image(name, 1) if name else None)
    sim.submit("base1")
    assert sim.finished["a1"].error.startswith("1 requests for this adapter wait, max_queue_per")
    assert sim.finished["base1"].error.startswith("1 requests for the base model wait")
    assert sim.finished.keys() == {"a1", "base1"}


def test_a_request_that_is_not_admitted_in_time_ends_and_the_others_stay(simulate):
    sim = simulate(max_num_seqs=1)
    sim.submit("running", max_tokens=30)
    sim.step()
    sim.submit("hurried", queue_timeout=0.5)
    sim.submit("patient", queue_timeout=50.0)
    run_for(sim, 4)
    assert sim.finished == {}
    run_for(sim, 1)
    end = sim.finished["hurried"]
    assert (end.reason, end.error_code) == ("error", "queue_timeout")
    assert "not admitted within 0.5 s" in end.error
    sim.run()
    assert sim.finished["patient"].reason == "length"


def test_a_deadline_ends_nothing_that_was_admitted_even_if_it_is_preempted(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    for request_id in ("old", "new"):
        sim.submit(request_id, num_prompt=7, max_tokens=12, queue_timeout=1.0)
    while not sim.scheduler.num_preemptions:
        sim.step()
    sim.now += 100.0
    sim.run()
    assert {end.reason for end in sim.finished.values()} == {"length"}


def test_a_deadline_of_an_id_that_came_again_is_not_the_new_requests(simulate):
    sim = simulate(max_num_seqs=1)
    sim.submit("r", queue_timeout=1.0)
    sim.cancel("r")
    sim.finished.clear()
    sim.submit("running", max_tokens=30)
    sim.step()
    sim.submit("r", queue_timeout=5.0)
    run_for(sim, 20)
    assert sim.finished == {}


def test_an_expired_request_no_longer_waits_for_its_adapter(simulate, image):
    sim = simulate()
    sim.submit("cold", adapter=image("a", 1), queue_timeout=1.0)
    assert sim.step() == []
    sim.now += 1.0
    assert sim.step() == []
    assert sim.finished["cold"].error_code == "queue_timeout"


def busy(simulate, num_waiting: int):
    """A server of one place that has served a while, and has requests waiting."""
    sim = simulate(num_pages=40, max_num_seqs=1)
    for i in range(num_waiting + 10):
        sim.submit(f"r{i}", num_prompt=4, max_tokens=8)
    while sim.scheduler.num_waiting > num_waiting:
        run_for(sim, 1)
    return sim


def test_a_wait_that_is_foreseen_is_refused_at_once_and_the_estimate_is_honest(simulate):
    sim = busy(simulate, num_waiting=20)
    sim.submit("hurried", queue_timeout=4.0)
    end = sim.finished["hurried"]
    assert end.error_code == "queue_timeout"
    assert "may wait 4 s" in end.error
    begun = sim.now
    sim.submit("patient", max_tokens=1)
    while not sim.tokens["patient"]:
        run_for(sim, 1)
    assert end.retry_after == pytest.approx(sim.now - begun, rel=0.15)


def test_the_same_request_is_taken_if_fairness_puts_it_first_or_it_may_wait_longer(simulate):
    sim = busy(simulate, num_waiting=20)
    sim.submit("other tenant", queue_timeout=4.0, tenant="light")
    sim.submit("urgent", queue_timeout=4.0, priority=-1)
    sim.submit("patient", queue_timeout=100.0)
    assert not sim.finished.keys() & {"other tenant", "urgent", "patient"}
    while len(sim.finished) < len(sim.requests):
        run_for(sim, 1)
    assert sim.finished["other tenant"].reason == sim.finished["urgent"].reason == "length"


def test_nothing_is_foreseen_before_there_is_evidence(simulate):
    sim = simulate(max_num_seqs=1)
    for i in range(50):
        sim.submit(f"r{i}")
    run_for(sim, int(EVIDENCE_SECONDS / STEP_SECONDS) - 1)
    sim.submit("hurried", queue_timeout=0.1)
    assert "hurried" not in sim.finished


def test_time_without_a_queue_is_no_evidence_of_a_slow_server(simulate):
    sim = simulate(num_pages=40, max_num_seqs=1)
    for i in range(100):
        sim.submit(f"idle{i}", max_tokens=1)
        run_for(sim, 1)
        sim.now += 60.0
    for i in range(40):
        sim.submit(f"r{i}", num_prompt=4, max_tokens=8)
    run_for(sim, 30)
    sim.submit("hurried", queue_timeout=60.0)
    assert "hurried" not in sim.finished


def test_an_expiry_says_when_another_try_may_do_better(simulate, image):
    sim = busy(simulate, num_waiting=20)
    sim.submit("cold", adapter=image("a", 1), queue_timeout=4.0)
    while "cold" not in sim.finished:
        run_for(sim, 1)
    num_seconds = STEP_SECONDS * 8 * sim.scheduler.num_waiting
    assert sim.finished["cold"].retry_after == pytest.approx(num_seconds, rel=0.15)
