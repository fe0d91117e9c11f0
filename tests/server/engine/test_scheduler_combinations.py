"""Combinations wait for all their members, pin them while they run, and are kept apart."""

from __future__ import annotations

import pytest


def loaded(sim, *names: str) -> None:
    """Finish the loads of these adapters, in this order."""
    for name in names:
        (index,) = (i for i, load in enumerate(sim.loader.pending) if load[0].digest == name)
        sim.loader.finish(index)


def test_a_combination_runs_when_its_last_member_is_loaded(simulate, mix):
    sim = simulate()
    sim.submit("r", adapter=mix(a=(2, 0.75), b=(1, 0.25)))
    assert sim.step() == []
    assert sorted(load[0].digest for load in sim.loader.pending) == ["a", "b"]
    loaded(sim, "b")
    assert sim.step() == []
    loaded(sim, "a")
    assert sim.step() == ["r"]
    sim.run()
    assert sim.finished["r"].reason == "length"
    assert sim.finished["r"].adapter_digest == mix(a=(2, 0.75), b=(1, 0.25)).digest
    assert sim.adapters.num_loads == 2


def test_members_are_loaded_once_for_all_who_need_them(simulate, image, mix):
    sim = simulate(num_slots=6, max_num_seqs=6)
    wanted = {
        "a": image("a", 1),
        "b": image("b", 1),
        "mix": mix(a=(1, 0.75), b=(1, 0.25)),
        "other": mix(a=(1, 0.25), b=(1, 0.75)),
        "scaled": mix(a=(1, -1.0)),
        "base": None,
    }
    for request_id, adapter in wanted.items():
        sim.submit(request_id, num_prompt=1, adapter=adapter)
    sim.step()
    loaded(sim, "a", "b")
    assert len(sim.step()) == 5
    sim.run()
    assert sim.adapters.num_loads == 2
    for request_id in wanted:
        assert sim.tokens[request_id] == sim.alone(request_id)


def test_a_member_that_fails_to_load_fails_the_requests_that_need_it_and_ends_vain_loads(
    simulate, image, mix
):
    sim = simulate(num_slots=6)
    sim.submit("mix", adapter=mix(a=(1, 0.5), b=(1, 0.5)))
    sim.submit("other", adapter=mix(b=(1, 0.5), c=(1, 0.5)))
    sim.submit("a", adapter=image("a", 1))
    sim.submit("b", adapter=image("b", 1))
    sim.step()
    sim.loader.fail([load[0].digest for load in sim.loader.pending].index("b"))
    sim.step()
    assert set(sim.finished) == {"mix", "other", "b"}
    assert {end.error_code for end in sim.finished.values()} == {"adapter_load_failed"}
    assert sim.loader.cancelled == {"c"}, "a is wanted still"
    sim.run()
    assert sim.finished["a"].reason == "length"


def test_a_load_goes_on_while_a_plain_or_a_combined_request_waits(simulate, image, mix):
    sim = simulate()
    sim.submit("plain", adapter=image("a", 1))
    sim.submit("mix", adapter=mix(a=(1, 0.5)))
    sim.step()
    sim.cancel("plain")
    assert sim.loader.cancelled == set()
    sim.submit("plain again", adapter=image("a", 1))
    sim.cancel("mix")
    assert sim.loader.cancelled == set()
    sim.cancel("plain again")
    assert sim.loader.cancelled == {"a"}


def test_a_drop_waits_for_combinations_with_the_adapter_and_holds_back_later_ones(
    simulate, image, mix
):
    sim = simulate(num_slots=5)
    adapter = mix(a=(2, 0.5), b=(1, 0.5))
    sim.submit("running", max_tokens=6, adapter=adapter)
    sim.step()
    loaded(sim, "a", "b")
    sim.step()
    sim.submit("waiting", max_tokens=2, adapter=mix(a=(2, 0.5), c=(1, 1.0)))
    sim.drop("a")
    sim.submit("after", max_tokens=2, adapter=adapter)
    sim.submit("b alone", max_tokens=2, adapter=image("b", 1))
    assert sorted(sim.step()) == ["b alone", "running"]
    assert sim.dropped == []
    sim.run()
    assert [(d.digest, d.freed_bytes) for d in sim.dropped] == [("a", 2 * sim.pool.page_bytes)]
    assert all(sim.tokens[request_id] == sim.alone(request_id) for request_id in sim.requests)
    assert sim.adapters.num_loads == 4, "a again, for the one that came after"


def test_an_aborting_drop_ends_combinations_with_the_adapter_in_flight(simulate, image, mix):
    sim = simulate(num_slots=4)
    sim.submit("mix", adapter=mix(a=(2, 0.5), b=(1, 0.5)))
    sim.submit("b", adapter=image("b", 1))
    sim.step()
    loaded(sim, "a", "b")
    sim.step()
    sim.drop("a", abort=True)
    assert {k: end.reason for k, end in sim.finished.items()} == {"mix": "cancelled"}
    assert [d.freed_bytes for d in sim.dropped] == [2 * sim.pool.page_bytes]
    sim.run()
    assert sim.finished["b"].reason == "length"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a": (1, 0.5), "b": (1, 0.5), "c": (1, 0.5)}, ("4 slots", "there are 3")),
        ({"d": (5, 0.5), "e": (8, 0.5)}, ("5 + 8 = 13 pages", "12")),
    ],
)
def test_what_could_never_run_is_refused_at_once_with_the_arithmetic(simulate, mix, members, words):
    sim = simulate()
    sim.submit("r", adapter=mix(**members))
    end = sim.finished["r"]
    assert (end.reason, end.error_code) == ("error", "invalid_value")
    assert all(word in end.error for word in words)
    assert sim.step() == []
    assert not sim.loader.pending


def test_a_combination_waits_for_a_slot_as_for_pages_and_nothing_goes_before_it(
    simulate, image, mix
):
    sim = simulate(num_slots=3)
    sim.submit("c", max_tokens=6, adapter=image("c", 1))
    sim.submit("a", max_tokens=2, adapter=image("a", 1))
    sim.step()
    loaded(sim, "c", "a")
    sim.step()
    sim.submit("mix", adapter=mix(a=(1, 0.5), b=(1, 0.5)))
    sim.step()
    loaded(sim, "b")
    while "c" not in sim.finished:
        assert "mix" not in sim.step()
        sim.submit(f"late {len(sim.requests)}", max_tokens=1)
    assert "mix" in sim.step()
    sim.run()
    assert sim.tokens["mix"] == sim.alone("mix")
    assert sim.adapters.num_evictions == 1, "c, whose slot it got"


def test_members_of_the_front_are_kept_while_one_of_them_loads(simulate, image, mix):
    sim = simulate(num_slots=4, max_num_seqs=1)
    for name in "ax":
        sim.submit(name, max_tokens=1, adapter=image(name, 1))
    sim.run()
    sim.submit("mix", adapter=mix(a=(1, 0.5), b=(1, 0.5)))
    sim.submit("y", adapter=image("y", 1))
    sim.submit("z", adapter=image("z", 1))
    sim.step()
    assert sim.adapters.is_resident("a")
    assert not sim.adapters.is_resident("x"), "it made way for the front's"
    sim.run()
    assert all(sim.tokens[request_id] == sim.alone(request_id) for request_id in sim.requests)
    assert sim.adapters.num_loads == 6, "no member was loaded twice"


def test_a_combination_is_preempted_and_computed_again(simulate, mix):
    sim = simulate(num_pages=8, prefix_cache=False)
    for i in range(3):
        sim.submit(f"r{i}", num_prompt=6, max_tokens=8, adapter=mix(a=(1, 0.5), b=(1, 2.0)))
    sim.run()
    assert sim.scheduler.num_preemptions > 0
    assert all(sim.tokens[request_id] == sim.alone(request_id) for request_id in sim.requests)


def test_only_the_same_weights_find_each_others_prefixes(simulate, image, mix):
    sim = simulate()
    prompt = [5, 3] * 5
    both, other = mix(a=(1, 0.75), b=(1, 0.25)), mix(a=(1, 0.25), b=(1, 0.75))
    for request_id, adapter in enumerate((both, other, image("a", 1), None, both, other)):
        sim.submit(str(request_id), adapter=adapter, prompt=prompt, max_tokens=1)
        sim.run()
    assert [sim.finished[str(i)].num_cached_tokens for i in range(6)] == [0, 0, 0, 0, 8, 8]


def test_a_combination_is_a_tenant_of_its_own(simulate, mix):
    sim = simulate()
    adapter = mix(a=(1, 0.75), b=(1, 0.25))
    sim.submit("r", adapter=adapter)
    assert sim.scheduler._live["r"].tenant == adapter.digest


def test_a_member_that_is_there_is_not_taken_by_others_while_another_loads(simulate, image, mix):
    sim = simulate(num_pages=8, prefix_cache=False)
    for name, pages in (("a", 2), ("c", 1)):
        sim.submit(name, num_prompt=1, max_tokens=1, adapter=image(name, pages))
        sim.run()
    sim.submit("c again", num_prompt=1, max_tokens=1, adapter=image("c", 1))
    sim.run()
    sim.submit("mix", num_prompt=1, adapter=mix(a=(2, 0.5), b=(2, 0.5)))
    sim.step()
    sim.submit("base", num_prompt=13, max_tokens=2)
    assert sim.step() == ["base"]
    assert sim.adapters.is_resident("a"), "though c is worth more"
    assert not sim.adapters.is_resident("c")
    sim.run()
    assert sim.tokens["mix"] == sim.alone("mix")
