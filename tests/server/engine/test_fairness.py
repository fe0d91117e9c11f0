"""Virtual counters: what is charged, when a tenant is lifted, and what may be forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import (
    INPUT_COST,
    MAX_FORGETTABLE,
    OUTPUT_COST,
    Backlog,
    VirtualCounters,
)
from server.engine.request import AdapterImage, Sampling, Submit
from server.engine.sequence import Sequence


def of(tenant: str | None, weight: float = 1.0, digest: str | None = None) -> Sequence:
    request = Submit(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=Sampling(max_tokens=1),
        adapter=None if digest is None else AdapterImage(digest, "1"),
        tenant=tenant,
        weight=weight,
    )
    return Sequence(request, 0)


@pytest.mark.parametrize(
    ("tenant", "digest", "charged"),
    [("me", "4f2a", "me"), ("", "4f2a", ""), (None, "4f2a", "4f2a"), (None, None, "base")],
)
def test_the_tenant_is_the_requests_own_or_its_adapter_or_the_base_model(tenant, digest, charged):
    counters = VirtualCounters()
    counters.charge_token(of(tenant, digest=digest))
    assert counters[charged] == OUTPUT_COST


def test_a_generated_token_costs_twice_a_prompt_token_and_weights_divide_both():
    counters = VirtualCounters()
    for tenant, weight in (("a", 1.0), ("b", 4.0)):
        counters.charge_prompt(of(tenant, weight), 10)
        counters.charge_token(of(tenant, weight))
    assert (counters["a"], counters["b"]) == (12.0, 3.0)
    assert counters.cost == 2 * (10 * INPUT_COST + OUTPUT_COST)
    assert (counters.num_admissions, counters.num_output_tokens) == (2, 2)


def test_a_tenant_that_comes_is_lifted_to_the_least_of_those_that_wait():
    counters = VirtualCounters()
    for tenant, cost in (("a", 30), ("b", 20), ("away", 5)):
        counters.charge_prompt(of(tenant), cost)
    counters.enter("b", 0)
    counters.enter("a", 0)
    counters.enter("new", 0)
    assert counters["new"] == 20


def test_what_a_tenant_was_served_more_is_never_taken_back():
    counters = VirtualCounters()
    counters.charge_prompt(of("rich"), 50)
    counters.enter("poor", 0)
    counters.enter("rich", 0)
    assert counters["rich"] == 50


def test_a_tenant_that_still_waits_is_not_lifted():
    counters = VirtualCounters()
    for tenant in "ab":
        counters.enter(tenant, 0)
    counters.charge_prompt(of("b"), 40)
    counters.enter("a", 0)
    assert counters["a"] == 0


def test_in_an_empty_queue_a_tenant_is_lifted_to_the_last_that_left():
    counters = VirtualCounters()
    for tenant in ("first", "last"):
        counters.enter(tenant, 0)
    for tenant in ("first", "last"):
        counters.leave(tenant, 0)
    counters.charge_prompt(of("last"), 25)
    counters.enter("new", 0)
    assert counters["new"] == 25


def test_a_starved_tenant_of_worse_priority_does_not_hold_lifts_down():
    counters = VirtualCounters()
    counters.enter("starved", 5)
    counters.charge_prompt(of("busy"), 70)
    counters.enter("busy", 0)
    counters.enter("new", 0)
    assert counters["new"] == 70


def test_a_backlog_costs_its_prompts_and_the_usual_output_within_its_limits():
    backlog, request = Backlog(), of("t")
    for _ in range(3):
        backlog.add(request)
    backlog.subtract(request)
    assert backlog.cost(usual_output=0.5) == 2 * (1 * INPUT_COST + 0.5 * OUTPUT_COST)
    assert backlog.cost(usual_output=99.0) == 2 * (1 * INPUT_COST + 1 * OUTPUT_COST)


def test_users_without_number_are_forgotten_and_debts_are_not():
    counters = VirtualCounters()
    counters.charge_prompt(of("debtor"), 10**9)
    for i in range(5 * MAX_FORGETTABLE):
        counters.enter(f"user{i}", 0)
        counters.leave(f"user{i}", 0)
        counters.charge_prompt(of(f"user{i}"), 7)
    assert len(counters) < 3 * MAX_FORGETTABLE
    assert counters["debtor"] == 10**9


tenants = st.sampled_from("abcd")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), tenants, st.integers(0, 1)),
            st.tuples(st.just("leave"), tenants, st.integers(0, 1)),
            st.tuples(st.just("charge"), tenants, st.integers(1, 50)),
        ),
        max_size=60,
    )
)
def test_lifts_are_those_of_the_paper_whatever_comes(operations):
    counters, waiting, last_left = VirtualCounters(), {0: [], 1: []}, None
    expected = dict.fromkeys("abcd", 0.0)
    for kind, tenant, number in operations:
        if kind == "charge":
            counters.charge_prompt(of(tenant), number)
            expected[tenant] += number
        elif kind == "enter":
            if tenant not in waiting[number]:
                others = [expected[other] for other in waiting[number]]
                left = 0.0 if last_left is None else expected[last_left]
                expected[tenant] = max(expected[tenant], min(others, default=left))
            waiting[number].append(tenant)
            counters.enter(tenant, number)
        elif tenant in waiting[number]:
            waiting[number].remove(tenant)
            counters.leave(tenant, number)
            if tenant not in waiting[number]:
                last_left = tenant
        counters.check()
        assert {each: counters[each] for each in "abcd"} == expected
