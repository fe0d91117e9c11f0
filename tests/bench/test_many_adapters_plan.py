"""Both engines get the same requests, and memory for a few adapters or for all that are named."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import numpy as np
import pytest

from bench.many_adapters_plan import Point, points, pools, saturation_traces, trace_of

OPTIONS = argparse.Namespace(
    adapters=100, ranks=(8, 16), fit=4, workloads=["zipf-1"], widths=(0.5, 2.0), lengths=(8, 64),
    clients=8, saturation_requests=20, requests=30, warm_requests=10, seeds=2,
)  # fmt: skip
PAGE_BYTES, BLOCK_SIZE = 1000, 8
SPEC = SimpleNamespace(
    page_bytes=PAGE_BYTES, geometry=SimpleNamespace(block_size=BLOCK_SIZE), max_context=256
)
FLEET = SimpleNamespace(stored=[SimpleNamespace(num_pages=20)] * 100, mean_pages=20)


def test_points_are_the_workloads_with_all_adapters_and_the_widths_of_what_fits():
    assert points(OPTIONS) == [
        Point("popularity", "zipf-1", 100),
        Point("cliff", "slora-1", 2),
        Point("cliff", "slora-1", 8),
    ]


def test_the_cliff_has_one_set_of_lengths_and_times_at_every_width():
    narrow, wide = (trace_of(OPTIONS, point, 3.0, seed=1) for point in points(OPTIONS)[1:])
    assert len(narrow) == OPTIONS.requests + OPTIONS.warm_requests
    for name in ("due_seconds", "num_prompt", "num_output"):
        assert np.array_equal(getattr(narrow, name), getattr(wide, name))
    assert (narrow.num_distinct, wide.num_distinct) == (2, 8)


def test_a_saturation_is_found_for_every_workload_that_is_played():
    found = saturation_traces(OPTIONS)
    assert found.keys() == {point.workload for point in points(OPTIONS)}
    assert {len(trace) for trace in found.values()} == {OPTIONS.saturation_requests}


def test_the_small_pool_holds_the_few_beside_the_kv_cache_of_the_longest_requests():
    few, _ = pools(OPTIONS, SPEC, FLEET)
    kv_pages = 8 * 16  # of 126 tokens each
    assert few["pool_bytes"] == (4 * 20 + kv_pages) * PAGE_BYTES


def test_the_large_pool_holds_every_trace_and_nothing_else_is_different():
    few, all_fit = pools(OPTIONS, SPEC, FLEET)
    traces = [trace_of(OPTIONS, p, 9.0, seed) for p in points(OPTIONS) for seed in (0, 1)]
    for trace in traces:
        tokens = trace.num_prompt + trace.num_output
        needed = 20 * trace.num_distinct + int((-(-tokens // BLOCK_SIZE)).sum())
        assert all_fit["pool_bytes"] >= needed * PAGE_BYTES
        assert all_fit["max_adapters"] >= trace.num_distinct
    assert {name for name in few if few[name] != all_fit[name]} == {"pool_bytes"}


@pytest.mark.parametrize("rate", [1.0, 7.5])
def test_which_adapters_are_asked_for_does_not_depend_on_the_rate(rate):
    """So the pools can be sized before the saturation is known."""
    for point in points(OPTIONS):
        one, other = (trace_of(OPTIONS, point, r, seed=0) for r in (2.0, rate))
        assert np.array_equal(one.adapter, other.adapter)
