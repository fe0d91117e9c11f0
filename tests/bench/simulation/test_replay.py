"""A simulated run is a run of the server: every request ends once, every invariant holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench.simulation.engine import Setup
from bench.simulation.experiment import shown
from bench.simulation.fleet import ATTENTION, LLAMA_7B, Fleet
from bench.simulation.machine import MACHINES
from bench.simulation.replay import Stalled, Traffic, play
from bench.simulation.transfers import VirtualClock
from bench.workloads import SLORA_RANKS, Trace, adapter_ranks, slora


def trace_of(*requests: tuple[float, int, int, int]) -> Trace:
    """(due, adapter, prompt, output) of each."""
    due, *whole = zip(*requests, strict=True)
    return Trace(np.array(due, float), *(np.array(column) for column in whole))


@pytest.mark.parametrize("num_pages", [80, 120])
@pytest.mark.parametrize("adapter_share", [None, 0.5])
def test_every_request_ends_once_with_all_its_tokens_and_all_owners_hold(
    num_pages, adapter_share, make_setup, make_trace, fleet
):
    setup = make_setup(num_pages, adapter_share=adapter_share)
    turns = []
    trace = make_trace()

    def check(engine):
        engine.check()
        turns.append(engine.adapters.num_loading)

    run = play(trace, setup, fleet, check)
    assert [t.num_tokens for t in run.timelines] == trace.num_output.tolist()
    assert [len(t.pieces) for t in run.timelines] == trace.num_output.tolist()
    assert all(t.error is None for t in run.timelines)
    for timeline in run.timelines:
        assert timeline.due <= timeline.sent <= timeline.pieces[0] <= timeline.ended
        assert timeline.pieces == sorted(timeline.pieces)
    assert any(turns), "no turn saw a load in progress"
    assert run.num_loads >= run.trace.num_distinct
    assert run.num_evictions > 0


def test_pages_that_run_short_cost_preemptions_and_no_request(make_setup, fleet):
    """Eight streams that grow to 25 pages each, in a pool of 120."""
    trace = trace_of(*[(0.0, -1, 10, 90)] * 8)
    run = play(trace, make_setup(120), fleet, lambda engine: engine.check())
    assert run.num_preemptions > 0
    assert [t.num_tokens for t in run.timelines] == [90] * 8


def test_equal_arguments_give_equal_runs(make_setup, make_trace, fleet):
    first, second = (play(make_trace(seed=3), make_setup(), fleet) for _ in range(2))
    assert first.timelines == second.timelines
    assert (first.counts, first.seconds) == (second.counts, second.seconds)
    assert play(make_trace(seed=4), make_setup(), fleet).timelines != first.timelines


def test_sloras_golden_trace_is_what_is_played():
    """187 of 200 adapters are asked for, and every one of 600 requests is answered in full."""
    trace = slora(200, 1, 2, 1, 300)
    fleet = Fleet(LLAMA_7B, adapter_ranks(200, SLORA_RANKS["S1"]), ATTENTION)
    few = dataclasses.replace(trace, num_output=trace.num_output // 16 + 1)
    run = play(few, Setup(MACHINES["a100-80"]), fleet)
    assert run.trace.num_distinct == run.num_loads == 187
    assert [t.due for t in run.timelines[:2]] == pytest.approx([0.1598, 3.0856], abs=1e-4)
    assert sum(t.num_tokens for t in run.timelines) == few.num_output.sum()
    assert run.seconds > 299


def test_time_passes_where_nothing_is_computed(make_setup, fleet):
    """Two requests a minute apart: the second's latency counts from when it is due."""
    run = play(trace_of((0.0, -1, 8, 2), (60.0, -1, 8, 2)), make_setup(), fleet)
    first, second = run.timelines
    assert second.sent == 60.0
    assert second.first_token_seconds == pytest.approx(first.first_token_seconds)
    assert run.counts.num_steps == 4
    assert run.seconds == pytest.approx(60.0 + first.ended)


def test_the_first_token_waits_for_the_load_and_no_other_stream_does(make_setup, fleet):
    """The load takes more than 10 ms, a step little more than one; a base stream is not held up."""
    run = play(trace_of((0.0, 1, 8, 2), (0.0, -1, 8, 20)), make_setup(), fleet)
    cold, base = run.timelines
    load_seconds = fleet.kind(fleet.image(1)).num_bytes / 75e6 + 1e-2
    assert cold.first_token_seconds > load_seconds > 5 * base.first_token_seconds
    alone = play(trace_of((0.0, -1, 8, 20)), make_setup(), fleet).timelines[0]
    assert max(np.diff(base.pieces)) < 3 * max(np.diff(alone.pieces))


def test_a_busy_server_takes_in_what_became_due_during_a_step(make_setup, fleet):
    run = play(trace_of((0.0, -1, 8, 4), (0.0005, -1, 8, 1)), make_setup(), fleet)
    assert run.timelines[1].sent == run.timelines[0].pieces[0] > 0.0005


def test_requests_wait_until_their_deadline_and_no_longer(make_setup, fleet):
    """One stream at a time, ten at once, each of some 10 ms: most are not begun within 30 ms."""
    setup = make_setup(max_num_seqs=1, queue_timeout=0.03)
    run = play(trace_of(*[(0.0, -1, 8, 7 + i) for i in range(10)]), setup, fleet)
    late = [t for t in run.timelines if t.error == "queue_timeout"]
    assert 5 <= len(late) < 10
    assert all(0.03 <= t.ended < 0.06 and not t.pieces for t in late)
    assert all(t.pieces[0] < 0.06 for t in run.timelines if t.error is None)
    assert shown(run)["num_failed"] == len(late)
    assert shown(run)["attainment"] == pytest.approx(1 - len(late) / 10)


def test_an_engine_that_waits_for_nothing_is_told_of(make_setup, make_trace, fleet):
    traffic = Traffic(make_trace(0), make_setup(), fleet, VirtualClock())
    traffic.loader = type("Loader", (), {"next_end": None})()
    with pytest.raises(Stalled, match="0 requests are open"):
        traffic.receive(wait=True)


def test_the_figures_of_a_run_say_how_many_adapters_were_at_work(make_setup, fleet):
    run = play(trace_of((0.0, 0, 8, 5), (0.0, 2, 8, 6), (0.0, 2, 8, 7)), make_setup(), fleet)
    found = shown(run)
    assert found["distinct_requested"] == 2
    assert found["most_distinct_per_step"] == 2
    assert found["loads_per_second"] == 2 / run.seconds
    assert 0 < found["adapter_share_of_time"] < 1
    assert found["completed_per_second"] == 3 / run.seconds
