"""What the scheduler plans, in which order, and how requests end."""

from __future__ import annotations

import itertools

import pytest

from server.engine.request import Finished, TokenLogprobs
from server.engine.scheduler import DuplicateRequestError, SampledToken


def shares(plan) -> dict[str, tuple[int, int]]:
    return {i.sequence.request_id: (i.start, i.num_tokens) for i in plan.items}


def tokens_for(plan, token_id: int = 1) -> list[SampledToken]:
    return [SampledToken(token_id) for _ in range(plan.num_samples)]


def test_a_prompt_is_cut_to_the_budget_and_samples_only_at_its_end(simulate):
    sim = simulate(max_batched_tokens=8)
    sim.submit("a", num_prompt=19, max_tokens=2)
    for share, samples in (((0, 8), False), ((8, 8), False), ((16, 3), True), ((19, 1), True)):
        sim.step()
        assert shares(sim.last_plan) == {"a": share}
        assert [item.samples for item in sim.last_plan.items] == [samples]
    assert sim.finished["a"].reason == "length"


def test_decodes_come_before_prefills_and_prefills_before_admissions(simulate):
    sim = simulate(num_pages=40, max_batched_tokens=8)
    sim.submit("decode", num_prompt=2, max_tokens=9)
    sim.step()
    sim.submit("prefill", num_prompt=12, max_tokens=2)
    sim.step()
    sim.submit("new", num_prompt=5, max_tokens=2)
    sim.step()
    assert shares(sim.last_plan) == {"decode": (3, 1), "prefill": (4, 4), "new": (0, 3)}


def test_a_long_prompt_takes_small_pieces_beside_many_decodes_and_whole_steps_alone(simulate):
    sim = simulate(num_pages=400, max_num_seqs=16, max_batched_tokens=24, max_context=200)
    for n in range(11):
        sim.submit(f"decode{n}", num_prompt=2, max_tokens=20)
    sim.step()
    sim.submit("long", num_prompt=100, max_tokens=1)
    sim.step()
    assert shares(sim.last_plan)["long"] == (0, 2)
    for n in range(11):
        sim.scheduler.cancel(f"decode{n}")
    sim.step()
    assert shares(sim.last_plan) == {"long": (2, 24)}


def test_no_more_sequences_run_than_max_num_seqs(simulate):
    sim = simulate(num_pages=40, max_num_seqs=2, max_batched_tokens=20)
    for i in range(4):
        sim.submit(f"r{i}", num_prompt=2, max_tokens=3)
    sim.step()
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (2, 2)
    sim.run()
    assert len(sim.finished) == 4


def test_a_plan_is_ordered_by_slot_with_the_base_model_first(simulate, image):
    sim = simulate(num_pages=40, max_batched_tokens=40)
    for request_id, name in (("x", "a"), ("y", "b"), ("z", "a"), ("base", None)):
        sim.submit(request_id, adapter=image(name, 1) if name else None)
    sim.step()
    sim.loader.finish()
    sim.loader.finish()
    ids = sim.step()
    slots = [item.slot for item in sim.last_plan.items]
    assert ids[0] == "base"
    assert slots[0] == -1
    assert slots == sorted(slots)
    assert {ids.index("x"), ids.index("z")} in ({1, 2}, {2, 3})


def test_a_request_waits_for_its_adapter_outside_the_batch_while_later_ones_go_on(simulate, image):
    sim = simulate()
    sim.submit("cold", adapter=image("a", 2))
    sim.submit("base")
    assert sim.step() == ["base"]
    assert sim.step() == ["base"]
    sim.loader.finish()
    assert sim.step() == ["base", "cold"]


def test_plan_is_none_while_everything_waits_for_loads(simulate, image):
    sim = simulate()
    sim.submit("cold", adapter=image("a", 2))
    assert sim.scheduler.plan() is None
    assert sim.scheduler.has_work
    sim.loader.finish()
    assert sim.step() == ["cold"]


def test_adapters_of_the_queue_are_loaded_ahead_within_a_bound(simulate, image):
    sim = simulate(num_pages=40, num_slots=9, max_num_seqs=1)
    sim.submit("running", max_tokens=9)
    for i in range(8):
        sim.submit(f"r{i}", adapter=image(f"a{i}", 1))
    sim.step()
    assert [image.digest for image, _, _ in sim.loader.pending] == ["a0", "a1", "a2", "a3"]


def test_others_go_on_however_long_a_load_takes(simulate, image):
    sim = simulate(num_pages=40, max_passes=0)
    sim.submit("cold", adapter=image("a", 2))
    for i in range(20):
        sim.submit(f"r{i}", max_tokens=2)
    for _ in range(40):
        sim.step()
    assert len(sim.finished) == 20
    sim.loader.finish()
    sim.submit("later", max_tokens=2)
    assert "cold" in sim.step()


def test_a_request_whose_load_ends_after_it_was_passed_often_goes_first(simulate, image):
    sim = simulate(num_pages=40, max_num_seqs=1, max_passes=3)
    sim.submit("cold", adapter=image("a", 2))
    for i in range(4):
        sim.submit(f"early{i}", max_tokens=1)
        sim.step()
    sim.loader.finish()
    sim.submit("later", max_tokens=1, tenant="never served")
    assert sim.step() == ["cold"]


def test_a_request_whose_adapter_finds_no_room_is_passed_max_passes_times_at_most(simulate, image):
    sim = simulate(num_pages=40, num_slots=1, max_num_seqs=9, max_batched_tokens=40, max_passes=3)
    sim.submit("hot", max_tokens=12, adapter=image("hot", 2))
    sim.step()
    sim.loader.finish()
    sim.step()
    sim.submit("cold", adapter=image("cold", 2))
    sim.step()
    for i in range(6):
        sim.submit(f"r{i}", max_tokens=30)
    assert [len(sim.step()) for _ in range(3)] == [4, 4, 4]
    while not sim.loader.pending:
        assert len(sim.step()) in (3, 4)
    assert len(sim.step()) == 6, "once it loads it holds nobody up"


def test_an_adapter_without_room_gets_it_within_the_bound_under_endless_traffic(simulate, image):
    sim = simulate(num_pages=8, num_slots=1, max_passes=2)
    number = itertools.count()
    for _ in range(4):
        sim.submit(f"hot{next(number)}", max_tokens=3, adapter=image("hot", 3))
    sim.step()
    sim.loader.finish()
    sim.step()
    sim.submit("cold", adapter=image("cold", 4))
    for _ in range(30):
        sim.submit(f"hot{next(number)}", max_tokens=3, adapter=image("hot", 3))
        if not sim.step() and sim.loader.pending:
            sim.loader.finish()
    assert sim.finished["cold"].reason == "length"


def test_a_load_never_evicts_the_adapter_of_a_request_further_ahead(simulate, image):
    sim = simulate(num_slots=1, max_num_seqs=1)
    sim.submit("running", max_tokens=9)
    sim.submit("first", adapter=image("a", 1))
    sim.step()
    sim.loader.finish()
    sim.submit("second", adapter=image("b", 1))
    sim.step()
    assert sim.adapters.is_resident("a")
    sim.run()
    assert sim.adapters.num_loads == 2


def test_nothing_is_loaded_while_a_sequence_waits_for_pages(simulate, image):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    sim.submit("running", num_prompt=12, max_tokens=3)
    sim.step()
    sim.submit("large", num_prompt=12)
    sim.submit("cold", adapter=image("a", 1))
    sim.step()
    assert sim.scheduler.num_waiting == 2
    assert sim.loader.pending == []


def test_a_sequence_is_not_admitted_into_the_pages_that_running_ones_need_next(simulate):
    sim = simulate(num_pages=4, max_batched_tokens=20)
    sim.submit("running", num_prompt=3, max_tokens=4)
    sim.step()
    sim.submit("new", num_prompt=12, max_tokens=2)
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_a_running_sequence_takes_the_pages_of_an_adapter_that_only_waiting_ones_need(
    simulate, image
):
    sim = simulate(num_pages=6, max_num_seqs=1)
    sim.submit("running", max_tokens=18)
    sim.submit("waiting", adapter=image("a", 3))
    sim.step()
    sim.loader.finish()
    sim.run()
    assert sim.finished["running"].reason == "length"
    assert sim.scheduler.num_preemptions == 0
    assert sim.adapters.num_loads == 2


def test_a_lone_sequence_waits_for_the_pages_of_a_load_instead_of_failing(simulate, image):
    sim = simulate(num_pages=6, max_num_seqs=1)
    sim.submit("running", max_tokens=18)
    sim.submit("cold", adapter=image("a", 3))
    while sim.step():
        assert sim.loader.pending
    sim.submit("later", num_prompt=14)
    assert sim.step() == []
    assert sim.finished == {}
    sim.run()
    for request_id in ("running", "cold", "later"):
        assert sim.finished[request_id].reason == "length"
        assert sim.tokens[request_id] == sim.alone(request_id)


def test_a_new_sequence_waits_for_the_pages_of_a_load_instead_of_failing(simulate, image):
    sim = simulate(num_pages=6)
    sim.adapters.request(image("a", 4))
    sim.submit("r", num_prompt=12)
    assert sim.step() == []
    assert sim.finished == {}
    sim.loader.finish()
    assert sim.step() == ["r"]


def test_idle_adapters_are_evicted_before_a_sequence_is_preempted(simulate, image):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    sim.submit("warm", max_tokens=1, adapter=image("a", 3))
    sim.run()
    sim.submit("r", num_prompt=18, max_tokens=5)
    sim.run()
    assert sim.adapters.num_evictions == 1
    assert sim.scheduler.num_preemptions == 0
    assert sim.tokens["r"] == sim.alone("r")


def test_the_newest_sequence_is_preempted_and_ends_with_the_same_tokens(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    sim.submit("old", num_prompt=7, max_tokens=14)
    sim.submit("new", num_prompt=7, max_tokens=12)
    sequences = dict(sim.scheduler._live)
    sim.run()
    assert sequences["old"].num_preemptions == 0
    assert sequences["new"].num_preemptions > 0
    for request_id in ("old", "new"):
        assert sim.tokens[request_id] == sim.alone(request_id)


def test_a_preempted_sequence_is_admitted_before_those_that_never_ran(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    sim.submit("old", num_prompt=7, max_tokens=14)
    sim.submit("new", num_prompt=7, max_tokens=12)
    while not sim.scheduler.num_preemptions:
        sim.step()
    sim.submit("latest", num_prompt=1, max_tokens=1)
    while "latest" not in (ids := sim.step()):
        assert sim.scheduler.has_work
    assert "new" in ids


def test_a_sequence_that_can_never_fit_ends_with_the_numbers(simulate):
    sim = simulate(num_pages=4, max_batched_tokens=20)
    sim.submit("prompt", num_prompt=17)
    sim.submit("growing", num_prompt=13, max_tokens=20)
    sim.run()
    for request_id, numbers in (("prompt", "17 tokens take 5 pages"), ("growing", "5 pages")):
        end = sim.finished[request_id]
        assert (end.reason, end.error_code) == ("error", "context_length_exceeded")
        assert numbers in end.error
        assert "the pool has 4" in end.error
    assert sim.finished["growing"].num_completion_tokens == 4


def test_a_sequence_that_fits_only_without_its_adapter_ends_and_the_next_goes_on(simulate, image):
    sim = simulate(num_pages=6, lookahead=1)
    sim.submit("large", num_prompt=14, adapter=image("a", 3))
    sim.submit("next", num_prompt=14)
    sim.run()
    assert sim.finished["large"].error_code == "context_length_exceeded"
    assert sim.finished["next"].reason == "length"


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "reason", "error_code"),
    [
        pytest.param(40, 4, "error", "context_length_exceeded", id="no room for a completion"),
        pytest.param(39, 4, "length", None, id="room for one token"),
        pytest.param(0, 4, "error", "invalid_request", id="empty prompt"),
        pytest.param(3, 0, "length", None, id="nothing to generate"),
    ],
)
def test_requests_at_the_edges_end_sensibly(simulate, num_prompt, max_tokens, reason, error_code):
    sim = simulate(max_context=40)
    sim.submit("r", num_prompt, max_tokens)
    sim.run()
    assert (sim.finished["r"].reason, sim.finished["r"].error_code) == (reason, error_code)


def test_a_stop_token_ends_without_being_emitted_and_is_counted(simulate):
    sim = simulate()
    sim.submit("r", num_prompt=3, max_tokens=9, stop=(7,))
    plan = sim.scheduler.plan()
    (event,) = sim.scheduler.commit(plan, tokens_for(plan, 4))
    assert event.token_ids == (4,)
    plan = sim.scheduler.plan()
    assert sim.scheduler.commit(plan, tokens_for(plan, 7)) == [
        Finished(request_id="r", reason="stop", num_prompt_tokens=3, num_completion_tokens=2)
    ]


def test_log_probabilities_travel_with_their_token(simulate):
    sim = simulate()
    sim.submit("r")
    plan = sim.scheduler.plan()
    logprobs = TokenLogprobs(chosen=-0.5)
    (event,) = sim.scheduler.commit(plan, [SampledToken(4, logprobs)])
    assert event.logprobs == (logprobs,)


def test_a_wrong_number_of_sampled_tokens_is_refused(simulate):
    sim = simulate()
    sim.submit("r")
    plan = sim.scheduler.plan()
    with pytest.raises(ValueError, match="0 sampled tokens for a plan that samples 1"):
        sim.scheduler.commit(plan, [])


def test_cancel_ends_a_request_wherever_it_stands(simulate, image):
    sim = simulate(max_num_seqs=1)
    sim.submit("running")
    sim.submit("waiting")
    sim.submit("cold", adapter=image("a", 1))
    sim.step()
    for request_id in ("running", "waiting", "cold", "unknown", "running"):
        sim.cancel(request_id)
    assert {end.reason for end in sim.finished.values()} == {"cancelled"}
    assert len(sim.finished) == 3
    assert sim.kv_cache.num_pages == 0


def test_a_request_cancelled_between_plan_and_commit_says_nothing_more(simulate):
    sim = simulate()
    sim.submit("r")
    sim.submit("other")
    plan = sim.scheduler.plan()
    sim.cancel("r")
    sim.submit("r2")
    events = sim.scheduler.commit(plan, tokens_for(plan))
    assert [event.request_id for event in events] == ["other"]


def test_a_live_request_id_is_refused_and_its_request_goes_on(simulate):
    sim = simulate()
    sim.submit("r")
    with pytest.raises(DuplicateRequestError, match="request r is live"):
        sim.submit("r")
    sim.run()
    assert sim.finished["r"].reason == "length"


def test_a_failed_load_ends_its_requests_and_no_others(simulate, image):
    sim = simulate()
    for request_id, name in (("x", "a"), ("y", "a"), ("z", "b")):
        sim.submit(request_id, adapter=image(name, 1))
    sim.submit("base")
    sim.step()
    sim.loader.fail(0)
    sim.run()
    for request_id in ("x", "y"):
        end = sim.finished[request_id]
        assert (end.reason, end.error_code) == ("error", "adapter_load_failed")
        assert "the disk is on fire" in end.error
        assert end.adapter_digest is None
    assert sim.finished["z"].reason == sim.finished["base"].reason == "length"


def test_an_image_refused_by_its_header_ends_its_request_and_no_other(simulate, image):
    sim = simulate()
    sim.loader.refused.add("a")
    sim.submit("x", adapter=image("a", 1))
    assert sim.step() == []
    assert sim.finished["x"].error_code == "adapter_load_failed"
    sim.submit("y", adapter=image("a", 1))
    sim.submit("base")
    assert sim.step() == ["base"]
    sim.run()
    assert sim.finished["y"].error_code == "adapter_load_failed"
    assert sim.finished["base"].reason == "length"


def test_events_name_the_digest_of_the_slot_that_computed_them(simulate, image):
    sim = simulate()
    sim.submit("r", adapter=image("a", 1))
    sim.step()
    sim.loader.finish()
    plan = sim.scheduler.plan()
    slot = plan.items[0].slot
    # A fault elsewhere: another adapter's record lies in the slot.
    sim.adapters._by_slot[slot].image = image("other", 1)
    (event,) = sim.scheduler.commit(plan, tokens_for(plan))
    assert event.adapter_digest == "other"


def test_a_step_that_failed_ends_its_own_requests_and_the_others_go_on(simulate):
    sim = simulate(max_num_seqs=1)
    sim.submit("r")
    sim.submit("other")
    plan = sim.scheduler.plan()
    sim.take(sim.scheduler.abandon(plan, "the step failed", "internal_error"))
    assert sim.finished["r"].error == "the step failed"
    sim.run()
    assert sim.finished["other"].reason == "length"


def test_a_plan_has_to_be_committed_before_the_next(simulate):
    sim = simulate()
    sim.submit("r")
    sim.scheduler.plan()
    with pytest.raises(AssertionError, match="neither committed nor abandoned"):
        sim.scheduler.plan()


def test_counts_prompts_and_generated_tokens_once_despite_preemption(simulate):
    sim = simulate(num_pages=6, max_batched_tokens=20)
    sim.submit("old", num_prompt=7, max_tokens=14)
    sim.submit("new", num_prompt=7, max_tokens=12)
    sim.run()
    assert sim.scheduler.num_preemptions > 0
    assert sim.scheduler.num_prompt_tokens == 14
    assert sim.scheduler.num_generated_tokens == 26


def test_a_step_looks_ahead_at_no_more_lines_than_its_lookahead(simulate, monkeypatch):
    sim = simulate(num_pages=40, max_num_seqs=1, lookahead=8)
    for i in range(500):
        sim.submit(f"r{i}", max_tokens=1, tenant=f"t{i}")
    looked = []
    first = sim.scheduler._waiting.first
    monkeypatch.setattr(
        sim.scheduler._waiting, "first", lambda n: looked.append(first(n)) or looked[-1]
    )
    plan = sim.scheduler.plan()
    assert len(plan.items) == 1
    assert [len(each) for each in looked] == [8]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 0),
        ("max_batched_tokens", 0),
        ("max_context", 1),
        ("max_passes", -1),
        ("attention_context", 0),
    ],
)
def test_refuses_limits_that_admit_nothing(simulate, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        simulate(**{name: value})
