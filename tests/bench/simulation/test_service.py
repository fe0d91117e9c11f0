"""Service is counted as the virtual counters count it, and a gap only where both tenants wait."""

from __future__ import annotations

import numpy as np
import pytest

from bench.replay import Timeline
from bench.simulation.engine import StepCounts
from bench.simulation.replay import Run
from bench.simulation.service import gap_bound, largest_gap
from bench.workloads import Trace


def run_of(*requests: tuple[int, int, float, list[float]]) -> Run:
    """(tenant, prompt, due, times of its tokens) of each request."""
    tenants, prompts, due, pieces = zip(*requests, strict=True)
    timelines = [
        Timeline(due=d, sent=d, pieces=p, ended=p[-1] if p else 99.0)
        for d, p in zip(due, pieces, strict=True)
    ]
    trace = Trace(
        np.array(due), np.array(tenants), np.array(prompts), np.array([len(p) for p in pieces])
    )
    return Run(trace, timelines, StepCounts(), 10.0, 0, 0, 0, 0)


def test_a_prompt_counts_one_a_token_and_an_output_two():
    """Tenant 0 gets 10 + 2 · 2 while both have requests that never begin; tenant 1 nothing."""
    run = run_of((0, 10, 0.0, [1.0, 2.0]), (0, 1, 0.0, []), (1, 5, 0.0, []))
    assert largest_gap(run) == 14


def test_nothing_counts_while_one_of_the_two_has_no_queue():
    run = run_of((0, 10, 0.0, [1.0, 2.0, 3.0]), (0, 10, 0.0, []), (1, 5, 4.0, [5.0]))
    assert largest_gap(run) == 0


def test_service_of_both_cancels():
    served, waits = (10, 0.0, [1.0, 2.0]), (1, 0.0, [])
    assert largest_gap(run_of((0, *served), (0, *waits), (1, *served), (1, *waits))) == 0


def test_the_bound_is_that_of_the_theorem():
    assert gap_bound(511, 100) == 2 * 511
    assert gap_bound(511, 1000) == 2 * 2 * 1000


def test_one_tenant_has_no_gap_to_anybody():
    assert largest_gap(run_of((0, 10, 0.0, [1.0]), (0, 10, 0.0, [2.0]))) == pytest.approx(0.0)
