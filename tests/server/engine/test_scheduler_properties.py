"""The scheduler's promises, under whatever clients, disks and operators do."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

STOP = 0
ADAPTERS = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "too-large": 13}

# Of adapters that the others use alone, too; the last two need more slots or pages than there are.
MIXES = (
    {"a": 0.75, "b": 0.25},
    {"a": 0.25, "b": 0.75},
    {"b": 0.5, "d": -2.0},
    {"a": -1.0},
    {"a": 1.0, "b": 1.0, "c": 1.0},
    {"d": 0.5, "e": 0.5},
)

# Prompts of which many requests send the first tokens; the first two begin alike.
PROMPTS = ([3, 1, 4, 1, 5] * 5, [3, 1, 4, 1, 5] * 2 + [9, 2] * 6, [2, 7, 1, 8] * 6)

names = st.sampled_from([None, None, *ADAPTERS])
operation = st.one_of(
    st.tuples(st.just("submit"), names, st.integers(1, 22), st.integers(1, 12), st.booleans()),
    st.tuples(st.just("submit"), names, st.integers(1, 8), st.integers(1, 20), st.booleans()),
    st.tuples(
        st.just("submit known"),
        names,
        st.integers(0, 2),
        st.integers(1, 22),
        st.integers(1, 12),
        st.sampled_from(["", "", "tenant"]),
    ),
    st.tuples(
        st.just("submit as"),
        names,
        st.sampled_from(["", "t", "u"]),
        st.sampled_from([0.5, 1.0, 3.0]),
        st.integers(-1, 1),
        st.none() | st.integers(1, 20),
    ),
    st.tuples(st.just("submit mix"), st.sampled_from(MIXES), st.integers(0, 2), st.integers(1, 22)),
    st.tuples(st.just("wait"), st.integers(1, 10)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("fail"), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 40)),
    st.tuples(st.just("drop"), st.sampled_from(list(ADAPTERS)), st.booleans()),
    st.tuples(st.just("preload"), st.sampled_from(list(ADAPTERS))),
    st.tuples(st.just("refuse"), st.sampled_from(list(ADAPTERS))),
)


def apply(sim, image, mix, operation) -> None:
    kind, *values = operation
    if kind == "submit":
        name, num_prompt, max_tokens, stops = values
        adapter = image(name, ADAPTERS[name]) if name else None
        stop = (STOP,) if stops else ()
        sim.submit(f"r{len(sim.requests)}", num_prompt, max_tokens, adapter, stop)
    elif kind == "submit known":
        name, prompt, num_prompt, max_tokens, salt = values
        adapter = image(name, ADAPTERS[name]) if name else None
        request_id = f"r{len(sim.requests)}"
        tokens = PROMPTS[prompt][:num_prompt]
        sim.submit(request_id, 0, max_tokens, adapter, (STOP,), tokens, salt)
    elif kind == "submit mix":
        weights, prompt, num_prompt = values
        adapter = mix(**{name: (ADAPTERS[name], weight) for name, weight in weights.items()})
        tokens = PROMPTS[prompt][:num_prompt]
        sim.submit(f"r{len(sim.requests)}", 0, 5, adapter, (STOP,), tokens)
    elif kind == "submit as":
        name, tenant, weight, priority, timeout = values
        adapter = image(name, ADAPTERS[name]) if name else None
        place = {"tenant": tenant, "weight": weight, "priority": priority, "queue_timeout": timeout}
        sim.submit(f"r{len(sim.requests)}", adapter=adapter, **place)
    elif kind == "wait":
        sim.now += values[0]
    elif kind == "step":
        for _ in range(values[0]):
            sim.step()
    elif kind in ("finish", "fail"):
        if sim.loader.pending:
            getattr(sim.loader, kind)(values[0])
    elif kind == "cancel":
        sim.cancel(f"r{values[0]}")
    elif kind == "drop":
        sim.drop(*values)
    elif kind == "preload":
        sim.adapters.request(image(values[0], ADAPTERS[values[0]]), is_preload=True)
    else:
        sim.loader.refused ^= {values[0]}


def check_the_end(sim) -> None:
    assert sim.finished.keys() == sim.requests.keys(), "one end for each request"
    for request_id, end in sim.finished.items():
        tokens, alone = sim.tokens[request_id], sim.alone(request_id)
        assert tokens == alone[: len(tokens)], "another request's tokens"
        assert end.num_completion_tokens == len(tokens) + (end.reason == "stop")
        if end.reason in ("stop", "length"):
            assert tokens == alone
        assert (end.reason == "error") == (end.error is not None) == (end.error_code is not None)
    assert len(sim.dropped) == sim.num_drops, "one answer for each Drop"
    assert sim.kv_cache.num_pages == 0
    assert sim.scheduler._reclaimer.make_room(sim.pool.num_pages), "nothing is left in use"
    assert sim.pool.num_free == sim.pool.num_pages, "every page comes back"
    assert len(sim.adapters._free_slots) == sim.adapters.num_slots, "every slot comes back"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(operation, max_size=60))
def test_every_request_ends_once_with_its_own_tokens_and_no_page_is_lost(
    simulate, image, mix, operations
):
    sim = simulate()
    for each in operations:
        apply(sim, image, mix, each)
        sim.check()
    sim.run()
    check_the_end(sim)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(operation, max_size=150),
    st.integers(2, 20),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(1, 8),
)
def test_the_same_holds_for_every_size_of_pool_batch_and_bound(
    simulate,
    image,
    mix,
    operations,
    num_pages,
    num_slots,
    num_seqs,
    num_tokens,
    num_passes,
    lookahead,
):
    sim = simulate(
        num_pages=num_pages,
        num_slots=num_slots,
        max_num_seqs=num_seqs,
        max_batched_tokens=num_tokens,
        max_passes=num_passes,
        lookahead=lookahead,
    )
    for each in operations:
        apply(sim, image, mix, each)
        sim.check()
    sim.run()
    check_the_end(sim)
