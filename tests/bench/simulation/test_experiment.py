"""Bars are judged by the median over seeds; rows are found by their labels."""

from __future__ import annotations

import dataclasses

import pytest

from bench.simulation.experiment import Bar, Case, Experiment, Row, measure, ratios, saturation


def row(labels, *values):
    return Row(labels, [{"rate": value} for value in values])


def test_the_median_decides():
    assert Bar("x", [0.8, 0.96, 0.97], 0.95, is_least=True).holds
    assert not Bar("x", [0.8, 0.94, 2.0], 0.95, is_least=True).holds
    assert Bar("x", [1.0, 3.0, 99.0], 3.0, is_least=False).holds
    assert not Bar("x", [3.1], 3.0, is_least=False).holds


def test_a_bar_tells_its_limit_and_its_spread():
    told = Bar("x", [3.0, 1.0, 2.0], 2.5, is_least=False).to_json()
    value = {"median": 2.0, "min": 1.0, "max": 3.0}
    assert told == {"bar": "x", "value": value, "at_most": 2.5, "holds": True}
    assert Bar("x", [3.0], 2.5, is_least=True).to_json()["at_least"] == 2.5


def test_ratios_are_taken_seed_by_seed():
    assert ratios(row({}, 2.0, 9.0), row({}, 1.0, 3.0), "rate") == [2.0, 3.0]


def test_saturation_is_measured_in_order_of_arrival(make_setup, make_trace, fleet):
    trace = make_trace(30)
    at_once = dataclasses.replace(trace, due_seconds=0 * trace.due_seconds)
    fair, in_order = (make_setup(is_fair=is_fair) for is_fair in (True, False))
    turns, arrival = (
        measure([Case({}, setup, fleet, lambda seed: at_once)], [0])[0].values("steady_per_second")
        for setup in (fair, in_order)
    )
    assert [saturation(Case({}, fair, fleet, lambda seed: at_once), [0])] == arrival
    assert turns != arrival


def test_a_row_is_found_by_labels_that_only_it_has():
    rows = [row({"n": 1, "split": 0.0}), row({"n": 1, "split": 0.5})]
    found = Experiment("memory", "t", rows)
    assert found.find(split=0.5) is rows[1]
    with pytest.raises(KeyError, match="2 rows of memory have"):
        found.find(n=1)


def test_every_case_is_played_for_every_seed(make_setup, make_trace, fleet):
    seeds = []

    def trace(seed):
        seeds.append(seed)
        return make_trace(6, seed=seed)

    cases = [Case({"n": n}, make_setup(), fleet, trace) for n in (1, 2)]
    rows = measure(cases, [5, 6], lambda run: {"more": float(len(run.trace))})
    assert seeds == [5, 6, 5, 6]
    assert [r.labels for r in rows] == [{"n": 1}, {"n": 2}]
    assert rows[0].values("more") == [6.0, 6.0]
    assert rows[0].runs == rows[1].runs
    assert rows[0].to_json()["num_requests"] == {"median": 6, "min": 6, "max": 6}
