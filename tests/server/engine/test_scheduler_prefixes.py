"""What the scheduler takes from the prefix cache, and what it leaves there."""

from __future__ import annotations

import pytest

from server.engine.plan import SampledToken
from server.memory import prefix_index

PROMPT = tuple(i * i % 11 for i in range(17))


def start_of(sim, request_id: str) -> int:
    """Where the step just planned begins in a sequence."""
    return next(i.start for i in sim.last_plan.items if i.sequence.request_id == request_id)


def assert_as_alone(sim) -> None:
    for request_id in sim.requests:
        assert sim.finished[request_id].reason == "length"
        assert sim.tokens[request_id] == sim.alone(request_id)


@pytest.fixture
def sim(simulate):
    return simulate(num_pages=40, max_batched_tokens=40)


@pytest.fixture
def ask(sim):
    """One request, run to its end; how many of its tokens were cached."""

    def ask(request_id, prompt=PROMPT, adapter=None, salt="", max_tokens=2) -> int:
        sim.submit(request_id, max_tokens=max_tokens, adapter=adapter, prompt=prompt, salt=salt)
        sim.run()
        return sim.finished[request_id].num_cached_tokens

    return ask


def test_a_known_prompt_is_computed_from_where_the_cache_ends(sim):
    sim.submit("first", prompt=PROMPT)
    sim.run()
    sim.submit("second", prompt=PROMPT)
    sim.step()
    assert start_of(sim, "second") == 16
    sim.run()
    assert_as_alone(sim)
    assert sim.scheduler.num_cached_tokens == 16
    assert sim.scheduler.num_prompt_tokens == 34


def test_tokens_and_end_say_how_many_were_cached(sim, ask):
    ask("first")
    sim.submit("second", prompt=PROMPT, max_tokens=1)
    plan = sim.scheduler.plan()
    token, end = sim.scheduler.commit(plan, sim._compute(plan.items[0]))
    assert (token.num_cached_tokens, end.num_cached_tokens) == (16, 16)


def test_the_last_block_of_a_prompt_that_is_known_to_its_end_is_computed_again(sim, ask):
    prompt = PROMPT[:16]
    assert ask("first", prompt) == 0
    assert ask("second", prompt) == 12
    assert_as_alone(sim)


def test_generated_tokens_are_known_to_the_next_turn(sim, ask):
    ask("first", PROMPT[:5], max_tokens=12)
    prompt = (*PROMPT[:5], *sim.tokens["first"], 3, 4, 5)
    assert ask("second", prompt) == 16, "all that was computed: 16 of 17 tokens"
    assert_as_alone(sim)


def test_a_sequence_shares_with_one_that_still_runs(sim):
    sim.submit("first", prompt=PROMPT, max_tokens=9)
    sim.step()
    sim.submit("second", prompt=PROMPT, max_tokens=9)
    sim.step()
    assert start_of(sim, "second") == 16
    tables = [sim.kv_cache.table(request_id) for request_id in ("first", "second")]
    assert tables[0][:4] == tables[1][:4]
    sim.run()
    assert_as_alone(sim)


def test_shared_blocks_survive_the_end_of_one_of_their_users(sim):
    sim.submit("first", prompt=PROMPT, max_tokens=9)
    sim.step()
    sim.submit("second", prompt=PROMPT, max_tokens=9)
    sim.step()
    sim.cancel("first")
    sim.check()
    assert sim.kv_cache.num_pages == 5
    sim.run()
    assert sim.tokens["second"] == sim.alone("second")


def test_of_two_prompts_alike_in_one_step_both_are_computed_and_one_copy_is_kept(sim):
    for request_id in ("first", "second"):
        sim.submit(request_id, prompt=PROMPT, max_tokens=5)
    sim.step()
    assert start_of(sim, "second") == 0
    assert sim.kv_cache.num_pages == 6
    sim.run()
    assert_as_alone(sim)


def test_nothing_is_found_of_another_adapter_or_the_base_model(sim, ask, image):
    for number, name in enumerate((None, "a", "b")):
        adapter = image(name, 2) if name else None
        assert ask(f"first{number}", adapter=adapter) == 0
        assert ask(f"again{number}", adapter=adapter) == 16
    assert_as_alone(sim)


def test_nothing_is_found_across_salts(sim, ask):
    for salt in ("", "x", "y"):
        assert ask(f"first{salt}", salt=salt) == 0
        assert ask(f"again{salt}", salt=salt) == 16


def test_a_preempted_sequence_finds_its_own_blocks_again(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    sim.submit("old", num_prompt=7, max_tokens=14)
    sim.submit("new", num_prompt=7, max_tokens=12)
    while not sim.scheduler.num_preemptions:
        assert sim.step()
    sim.cancel("old")
    sim.step()
    assert start_of(sim, "new") == 8
    sim.run()
    assert sim.tokens["new"] == sim.alone("new")
    assert sim.finished["new"].num_cached_tokens == 0, "as of its first admission"


def test_a_long_prompt_of_which_little_is_left_to_compute_is_computed_at_once(simulate):
    sim = simulate(num_pages=80, max_num_seqs=16, max_batched_tokens=24, max_context=80)
    prompt = tuple(i * i % 11 for i in range(60))
    sim.submit("first", prompt=prompt, max_tokens=1)
    sim.run()
    for n in range(11):
        sim.submit(f"decode{n}", num_prompt=1, max_tokens=20)
    sim.step()
    sim.submit("second", prompt=prompt, max_tokens=1)
    sim.step()
    assert "second" in sim.finished
    assert sim.finished["second"].num_cached_tokens == 56


def test_a_sequence_is_admitted_into_the_pages_that_it_shares(simulate):
    sim = simulate(num_pages=7, max_batched_tokens=40)
    sim.submit("first", prompt=PROMPT, max_tokens=2)
    sim.step()
    sim.submit("other", prompt=PROMPT[::-1], max_tokens=2)
    sim.submit("second", prompt=PROMPT, max_tokens=2)
    assert "other" not in sim.step(), "5 pages more than there are"
    sim.run()
    assert_as_alone(sim)


def test_cached_prefixes_make_way_for_a_new_sequence(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=40)
    for request_id, prompt in (("first", PROMPT), ("other", PROMPT[::-1])):
        sim.submit(request_id, prompt=prompt, max_tokens=2)
        sim.run()
    assert sim.kv_cache.prefixes.num_evictions > 0
    assert sim.scheduler.num_preemptions == 0
    assert_as_alone(sim)


def test_an_evicted_adapter_takes_its_prefixes_with_it(simulate, image):
    sim = simulate(num_pages=40, num_slots=1, max_batched_tokens=40)
    for number, name in enumerate(("a", "b", "a")):
        sim.submit(f"r{number}", prompt=PROMPT, max_tokens=2, adapter=image(name, 2))
        sim.run()
        assert sim.finished[f"r{number}"].num_cached_tokens == 0
        assert sim.kv_cache.prefixes.digests == {name}
    assert sim.adapters.num_evictions == 2


def test_a_dropped_adapter_leaves_no_prefix_behind(sim, ask, image):
    ask("r", adapter=image("a", 2))
    sim.drop("a")
    assert sim.pool.num_free == sim.pool.num_pages


def test_what_another_adapter_computed_is_nobodys_prefix(sim, image):
    sim.submit("r", prompt=PROMPT, adapter=image("a", 1))
    sim.step()
    sim.loader.finish()
    plan = sim.scheduler.plan()
    # A fault elsewhere: another adapter's record lies in the slot.
    sim.adapters._by_slot[plan.items[0].slot].image = image("other", 1)
    sim.scheduler.commit(plan, [SampledToken(3)])
    assert len(sim.kv_cache.prefixes) == 0


def test_a_step_that_failed_publishes_nothing(sim):
    sim.submit("r", prompt=PROMPT)
    plan = sim.scheduler.plan()
    sim.take(sim.scheduler.abandon(plan, "the step failed", "internal_error"))
    assert len(sim.kv_cache.prefixes) == 0
    assert sim.pool.num_free == sim.pool.num_pages


def test_without_a_prefix_cache_every_prompt_is_computed(simulate):
    sim = simulate(num_pages=40, max_batched_tokens=40, prefix_cache=False)
    for request_id in ("first", "second"):
        sim.submit(request_id, prompt=PROMPT)
        sim.run()
    assert sim.scheduler.num_cached_tokens == 0
    assert sim.pool.num_free == sim.pool.num_pages


def test_each_block_is_hashed_once_however_many_steps_it_waits(simulate, monkeypatch):
    sim = simulate(num_pages=6, max_batched_tokens=40)
    sim.submit("running", num_prompt=12, max_tokens=8)
    sim.step()
    hashed = []
    real = prefix_index.sha256
    monkeypatch.setattr(prefix_index, "sha256", lambda data: hashed.append(data) or real(data))
    sim.submit("waits", prompt=PROMPT, max_tokens=1)
    sim.run()
    assert sim.finished["waits"].reason == "length"
    own = [data for data in hashed if len(data) == 32 + 4 * sim.block_size]
    assert len(own) == len(set(own))
