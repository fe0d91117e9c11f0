"""The stated bars are judged from the medians over seeds of the rows that they name."""

from __future__ import annotations

import pytest

from bench.many_adapters_table import COMPARED, bars, table

FIGURES = (
    "completed_per_second", "first_token_p50_seconds", "first_token_p99_seconds",
    "inter_token_p50_seconds", "inter_token_p99_seconds", "loads_per_second", "resident",
    "hit_share", "distinct_requested", "distinct_at_once",
)  # fmt: skip


def seeds(value):
    return {"median": value, "min": value, "max": value}


def row(part, num_adapters, served, *, ratios=(1.0, 1.0, 1.0), loads=0.0, failed=0.0, first=0.1):
    figures = {name: seeds(0.5) for name in FIGURES}
    return {
        "part": part,
        "workload": "slora-1",
        "num_adapters": num_adapters,
        "rate": 4.0,
        "served": served,
        **figures,
        "first_token_p99_seconds": seeds(first),
        "loads_per_second": seeds(loads),
        "num_failed": seeds(failed),
        "over_resident": {name: seeds(ratio) for name, ratio in zip(COMPARED, ratios, strict=True)},
    }


def verdicts(*rows):
    return {bar["bar"]: bar["holds"] for bar in bars({"rows": [RESIDENT, *rows]}, 16)}


RESIDENT = row("popularity", 1000, "resident")


@pytest.mark.parametrize(
    ("ratios", "held"), [((0.9, 1.2, 9.0), [True, True]), ((0.89, 1.21, 1.0), [False, False])]
)
def test_throughput_and_tokens_are_held_against_all_resident(ratios, held):
    found = verdicts(row("popularity", 1000, "paged", ratios=ratios, loads=3.0))
    assert found == {
        "slora-1, 1000 adapters: throughput over resident": held[0],
        "slora-1, 1000 adapters: p99 inter-token time over resident": held[1],
        "failed requests": True,
        "loads a second with all resident": True,
    }


@pytest.mark.parametrize(("ratio", "held"), [(3.0, True), (3.1, False)])
def test_the_cliff_is_judged_at_twice_what_fits(ratio, held):
    found = verdicts(
        row("cliff", 32, "paged", ratios=(1, 1, ratio)), row("cliff", 64, "paged", ratios=(1, 1, 9))
    )
    assert found["2 x what fits: p99 TTFT over resident"] is held


@pytest.mark.parametrize(("last", "smooth"), [(0.9, True), (1.0, False)])
def test_growth_is_smooth_unless_one_width_multiplies_it(last, smooth):
    points = [(64, last), (16, 0.1), (32, 0.3)]  # in any order
    found = verdicts(*(row("cliff", n, "paged", first=first) for n, first in points))
    assert found["p99 TTFT, largest growth from one width to the next"] is smooth


def test_a_failed_request_of_any_row_and_a_load_beside_all_resident_miss_their_bars():
    found = verdicts(row("cliff", 8, "paged", failed=1.0), row("cliff", 8, "resident", loads=0.1))
    assert found == {"failed requests": False, "loads a second with all resident": False}


def test_the_table_has_a_line_for_each_row_cold_start_and_bar():
    numbers = {
        "rows": [RESIDENT, row("popularity", 1000, "paged", ratios=(0.95, 1.1, 2.0))],
        "cold_starts": [
            {
                "rank": 16,
                "tier": "disk",
                "first_token_seconds": {"median": 0.05, "p10": 0.04, "p90": 0.06},
                "quiet_gap_p99_seconds": {"median": 0.02},
                "gap_p99_seconds": {"median": 0.03},
            }
        ],
    }
    lines = table(numbers | {"bars": bars(numbers, 16)}, 16).splitlines()
    assert lines[1].split()[:4] == ["slora-1", "1000", "62.5", "resident"]
    assert lines[2].split()[-3:] == ["0.95", "1.10", "2.00"]
    assert lines[4].split() == ["16", "disk", "50.0", "(40.0", "to", "60.0)", "20.0/30.0"]
    assert [line.rsplit(": ")[-1] for line in lines[5:]] == ["holds"] * 4
