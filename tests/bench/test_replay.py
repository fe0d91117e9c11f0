"""Requests go out when they are due, and the figures are those of a sheet of paper."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from bench.load_test import service
from bench.replay import (
    RequestFailed,
    Timeline,
    closed_loop,
    distinct_at_once,
    figures,
    open_loop,
    steady_rate,
)


def one_at_a_time(seconds):
    """A server that answers one request after the other, each in two pieces."""
    busy = asyncio.Lock()

    async def ask(_, arrived):
        async with busy:
            await asyncio.sleep(seconds / 2)
            arrived()
            await asyncio.sleep(seconds / 2)
            arrived()
        return 2

    return ask


def test_an_open_loop_sends_on_time_and_counts_latency_from_then(virtual_run):
    """Ten requests a second apart to a server that takes three for each: no omission."""

    async def main():
        return await open_loop(np.arange(10.0), one_at_a_time(3.0))

    timelines = virtual_run(main())
    assert [t.sent for t in timelines] == pytest.approx(list(range(10)))
    assert [t.ended for t in timelines] == pytest.approx([3 * (i + 1) for i in range(10)])
    waits = [t.first_token_seconds for t in timelines]
    assert waits == pytest.approx([3 * i + 1.5 - i for i in range(10)])


def test_a_sender_that_is_late_still_counts_from_when_the_request_was_due(virtual_run):
    async def main():
        async def ask(i, arrived):
            arrived()
            return 1

        loop = asyncio.get_running_loop()
        loop.call_at(0.5, loop.pause, 5.0)
        return await open_loop(np.array([0.0, 1.0, 2.0]), ask)

    timelines = virtual_run(main())
    assert [t.first_token_seconds for t in timelines] == pytest.approx([0, 4, 3])
    assert figures(timelines)["send_lag_p99_seconds"] == pytest.approx(4, abs=0.1)


def test_a_closed_loop_keeps_its_clients_busy_and_no_more(virtual_run):
    most = under_way = 0

    async def main():
        async def ask(i, arrived):
            nonlocal most, under_way
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(1 + i % 3)
            under_way -= 1
            arrived()
            return 1

        return await closed_loop(20, 4, ask)

    timelines = virtual_run(main())
    assert len(timelines) == 20
    assert most == 4


def test_a_failed_request_is_counted_and_stops_no_other(virtual_run):
    async def main():
        async def ask(i, arrived):
            await asyncio.sleep(1)
            if i == 1:
                raise RequestFailed("503")
            arrived()
            return 1

        return await open_loop(np.zeros(3), ask)

    timelines = virtual_run(main())
    assert [t.error for t in timelines] == [None, "503", None]
    found = figures(timelines)
    assert (found["num_requests"], found["num_failed"]) == (3, 1)
    assert found["completed_per_second"] == pytest.approx(2)


def test_rates_and_percentiles_are_over_the_run_and_its_completed_requests():
    timelines = [
        Timeline(due=0.0, sent=0.0, pieces=[1.0, 2.0, 4.0], ended=4.0, num_tokens=3),
        Timeline(due=2.0, sent=2.0, pieces=[5.0, 8.0], ended=8.0, num_tokens=2),
    ]
    found = figures(timelines)
    assert found["completed_per_second"] == 2 / 8
    assert found["output_tokens_per_second"] == 5 / 8
    assert found["first_token_p50_seconds"] == 2.0
    assert found["inter_token_p50_seconds"] == 2.0


def test_no_completed_request_gives_no_rates_instead_of_a_fault():
    failed = [Timeline(due=0.0, sent=0.0, ended=1.0, error="refused")]
    found = figures(failed)
    assert math.isnan(found["completed_per_second"])
    assert found["num_failed"] == 1


def test_the_steady_rate_leaves_out_the_ramp_and_the_drain():
    """Four a second in the middle, after a slow start and before a slow end."""
    ends = [10.0, *(12 + i / 4 for i in range(18)), 40.0]
    timelines = [Timeline(due=0.0, sent=0.0, pieces=[t], ended=t, num_tokens=1) for t in ends]
    assert steady_rate(timelines) == pytest.approx(4)


def test_distinct_adapters_are_weighted_by_time():
    def decoding(begin, end):
        return Timeline(due=begin, sent=begin, pieces=[begin, end], ended=end, num_tokens=2)

    timelines = [decoding(0, 4), decoding(2, 4), decoding(2, 6), decoding(0, 9)]
    # adapters 7 and 8 from 2 to 4, one of them before and after; the base does not count
    assert distinct_at_once(timelines, [7, 7, 8, -1]) == {"mean": (2 + 4 + 2) / 6, "most": 2}
    assert distinct_at_once(timelines[3:], [-1]) == {"mean": 0.0, "most": 0.0}


def test_attainment_and_satisfaction_are_sloras():
    def answered(after):
        return Timeline(due=1.0, sent=1.0, pieces=[1.0 + after], ended=9.0, num_tokens=1)

    failed = Timeline(due=1.0, sent=1.0, ended=2.0, error="aborted")
    found = service([answered(0.0), answered(3.0), answered(7.0), failed], slo_seconds=6.0)
    assert found["attainment"] == 2 / 4
    assert found["satisfaction"] == pytest.approx((1 + 0.75 + 0 + 0) / 4)
