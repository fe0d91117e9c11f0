"""Who is served how much: gaps, weights, priorities, preemption, and the bound on passes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import INPUT_COST, OUTPUT_COST

MAX_PROMPT, MAX_OUTPUT, MAX_NUM_SEQS = 12, 10, 3
NEVER = 10**6
"""Passes that no test reaches."""


def backlogged(simulate, lengths: dict[str, list[tuple[int, int]]], **settings):
    """A server whose tenants have all submitted before its first step."""
    settings = {"max_passes": NEVER, "max_num_seqs": MAX_NUM_SEQS, **settings}
    sim = simulate(num_pages=60, max_batched_tokens=16, prefix_cache=False, **settings)
    for tenant, requests in lengths.items():
        for i, (num_prompt, max_tokens) in enumerate(requests):
            sim.submit(f"{tenant}{i}", num_prompt, max_tokens, tenant=tenant)
    return sim


def service(sim, tenant: str) -> int:
    """What a tenant was served, counted from its events: prompts of admitted ones, and tokens."""
    waiting = {s.request_id for s in sim.scheduler._waiting}
    return sum(
        INPUT_COST * len(request.prompt_token_ids) + OUTPUT_COST * len(sim.tokens[request_id])
        for request_id, request in sim.requests.items()
        if request.tenant == tenant and request_id not in waiting
    )


def waits(sim, tenant: str) -> bool:
    return any(s.tenant == tenant for s in sim.scheduler._waiting)


requests = st.lists(
    st.tuples(st.integers(1, MAX_PROMPT), st.integers(1, MAX_OUTPUT)), min_size=10, max_size=30
)


@settings(max_examples=60, deadline=None)
@given(requests, requests)
def test_the_service_gap_of_two_backlogged_tenants_stays_within_the_published_bound(
    simulate, heavy, light
):
    sim = backlogged(simulate, {"heavy": heavy, "light": light})
    most_at_once = MAX_NUM_SEQS * (MAX_PROMPT + MAX_OUTPUT)
    bound = 2 * max(INPUT_COST * MAX_PROMPT, OUTPUT_COST * most_at_once)
    gaps = [0]
    while waits(sim, "heavy") and waits(sim, "light"):
        sim.step()
        gaps.append(service(sim, "heavy") - service(sim, "light"))
        assert max(gaps) - min(gaps) <= bound
    assert sim.scheduler.num_preemptions == 0


def test_one_tenant_for_all_is_first_come_first_served_and_another_need_not_wait(simulate):
    sim = backlogged(simulate, {"": [(MAX_PROMPT, MAX_OUTPUT)] * 30})
    sim.submit("late", 1, 1, tenant="")
    sim.submit("fair", 1, 1, tenant="light")
    sim.run()
    order = list(sim.finished)
    assert order.index("fair") <= MAX_NUM_SEQS
    assert order.index("late") >= 30 - MAX_NUM_SEQS


def test_a_weight_of_two_gives_twice_the_service(simulate):
    sim = simulate(num_pages=60, max_num_seqs=2, prefix_cache=False)
    for i in range(100):
        for tenant, weight in (("gold", 2.0), ("plain", 1.0)):
            sim.submit(f"{tenant}{i}", 4, 4, tenant=tenant, weight=weight)
    while waits(sim, "gold"):
        sim.step()
    assert service(sim, "gold") / service(sim, "plain") == pytest.approx(2.0, rel=0.05)


def test_a_tenant_that_comes_back_is_not_owed_what_it_did_not_use(simulate):
    sim = backlogged(simulate, {"busy": [(4, 4)] * 40}, max_num_seqs=1)
    for _ in range(80):
        sim.step()
    for i in range(20):
        sim.submit(f"back{i}", 4, 4, tenant="back")
    before = service(sim, "busy")
    for _ in range(40):
        sim.step()
    assert service(sim, "busy") - before == pytest.approx(service(sim, "back"), abs=2 * 12)


def test_a_preempted_sequence_is_charged_once(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20, prefix_cache=False)
    for tenant in ("old", "new"):
        sim.submit(tenant, 7, 12, tenant=tenant)
    sim.run()
    assert sim.scheduler.num_preemptions > 0
    for tenant in ("old", "new"):
        assert sim.scheduler._counters[tenant] == 7 * INPUT_COST + 12 * OUTPUT_COST


def test_cached_tokens_are_free(simulate):
    sim = simulate()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for tenant in ("first", "second"):
        sim.submit(tenant, max_tokens=1, prompt=prompt, tenant=tenant)
        sim.run()
    counters = sim.scheduler._counters
    assert counters["first"] == 9 * INPUT_COST + OUTPUT_COST
    lifted = counters["first"]
    assert counters["second"] == lifted + INPUT_COST + OUTPUT_COST


def test_the_sequence_of_the_most_served_tenant_is_preempted_even_if_others_are_newer(simulate):
    sim = simulate(num_pages=8, max_batched_tokens=20, prefix_cache=False)
    sim.submit("before", 9, 9, tenant="served")
    sim.run()
    sim.submit("rich", 7, 16, tenant="served")
    sim.submit("poor", 7, 16, tenant="new")
    sequences = dict(sim.scheduler._live)
    sim.scheduler._counters.charge_prompt(sequences["rich"], 100)
    sim.run()
    assert (sequences["rich"].num_preemptions > 0, sequences["poor"].num_preemptions) == (True, 0)
    for request_id in ("rich", "poor"):
        assert sim.tokens[request_id] == sim.alone(request_id)


def test_of_two_priorities_the_worse_is_preempted(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20, prefix_cache=False)
    sim.submit("later", 7, 12, priority=1)
    sim.submit("sooner", 7, 12)
    sequences = dict(sim.scheduler._live)
    sim.run()
    assert sequences["later"].num_preemptions > 0 == sequences["sooner"].num_preemptions


def test_better_priorities_go_first_and_worse_ones_within_the_bound(simulate):
    sim = simulate(num_pages=60, max_num_seqs=1, max_passes=3)
    sim.submit("running")
    sim.step()
    sim.submit("worse", priority=5)
    for i in range(9):
        sim.submit(f"better{i}", priority=-5, tenant=f"t{i}")
    sim.run()
    assert list(sim.finished).index("worse") == 1 + 3


arrivals = st.lists(
    st.tuples(st.sampled_from("stuv"), st.integers(-1, 1), st.integers(1, 9), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(arrivals, st.integers(0, 4))
def test_no_request_is_passed_more_often_than_follows_from_those_before_it(
    simulate, arrivals, max_passes
):
    """(k + 1) · max_passes + k · n, with k before it in its line and n other lines."""
    sim = simulate(num_pages=80, max_num_seqs=2, max_passes=max_passes)
    before: dict[str, int] = {}
    passes: Counter[str] = Counter()
    admitted: set[str] = set()
    most_lines = 12

    def step() -> None:
        waiting = {s.request_id: s.arrival for s in sim.scheduler._waiting}
        arrival_of = {s.request_id: s.arrival for s in sim.scheduler._live.values()}
        new = set(sim.step()) - admitted
        admitted.update(new)
        for request_id, arrival in waiting.items():
            if request_id not in admitted:
                passes[request_id] += sum(arrival_of[other] > arrival for other in new)
                k = before[request_id]
                assert passes[request_id] <= (k + 1) * max_passes + k * (most_lines - 1)
                assert k or passes[request_id] <= max_passes

    for i, (tenant, priority, max_tokens, num_steps) in enumerate(arrivals):
        before[f"r{i}"] = sum(
            s.tenant == tenant and s.request.priority == priority for s in sim.scheduler._waiting
        )
        sim.submit(f"r{i}", 2, max_tokens, tenant=tenant, priority=priority)
        for _ in range(num_steps):
            step()
    while sim.scheduler.has_work:
        step()
    assert sim.finished.keys() == sim.requests.keys()
