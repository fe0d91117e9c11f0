"""The whole bench at its smallest: two engines, all parts, one record."""

from __future__ import annotations

import json
import sys

import pytest

from bench import many_adapters
from bench.cold_start import TIERS


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What `python -m bench.many_adapters --quick` wrote."""
    output = tmp_path_factory.mktemp("results") / "many_adapters.json"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            patch.setenv(name, "1")  # of the engines: other processes may have the other cores
        patch.setattr(sys, "argv", ["bench", "--quick", "--output", str(output)])
        many_adapters.main()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_every_point_is_played_on_both_engines_and_no_request_fails(record):
    rows = [(r["part"], r["workload"], r["num_adapters"], r["served"]) for r in record["rows"]]
    assert rows == [
        (*point, served)
        for point in (
            ("popularity", "slora-1", 12),
            ("popularity", "zipf-1", 12),
            ("cliff", "slora-1", 3),
            ("cliff", "slora-1", 6),
        )
        for served in ("resident", "paged")
    ]
    assert all(row["num_failed"]["max"] == 0 for row in record["rows"])


@pytest.mark.slow
def test_only_the_engine_with_memory_for_a_few_loads(record):
    loads = {
        served: [r["loads_per_second"]["max"] for r in record["rows"] if r["served"] == served]
        for served in ("resident", "paged")
    }
    assert max(loads["resident"]) == 0
    assert max(loads["paged"]) > 0


@pytest.mark.slow
def test_answers_are_checked_dense_and_in_a_crowd(record):
    assert record["check"]["distance_to_dense"] < record["check"]["distance_to_base"] / 2
    assert record["check"]["num_adapters"] == 6
    assert record["check"]["distance_to_own"] < record["check"]["distance_to_another"]
    assert record["stored"]["by_rank"] == {"4": 6, "8": 6}


@pytest.mark.slow
def test_a_cold_start_is_measured_in_every_tier(record):
    assert [row["tier"] for row in record["cold_starts"]] == list(TIERS)
    assert all(row["first_token_seconds"]["median"] > 0 for row in record["cold_starts"])


@pytest.mark.slow
def test_every_stated_bar_is_judged(record):
    assert [bar["bar"] for bar in record["bars"]] == [
        "slora-1, 12 adapters: throughput over resident",
        "slora-1, 12 adapters: p99 inter-token time over resident",
        "zipf-1, 12 adapters: throughput over resident",
        "zipf-1, 12 adapters: p99 inter-token time over resident",
        "2 x what fits: p99 TTFT over resident",
        "p99 TTFT, largest growth from one width to the next",
        "failed requests",
        "loads a second with all resident",
    ]
