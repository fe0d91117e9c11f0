"""The scheduler is timed under a load that is kept, and judged by the stated bars."""

from __future__ import annotations

import json
import sys

import pytest

from bench import scheduler_time
from bench.scheduler_time import Load, bars, table


def row(running, waiting, p50, p99=0.002):
    part = {"p50": p50, "p99": p99}
    sizes = {"num_running": running, "num_waiting": waiting, "num_adapters": 5000}
    return {**sizes, "plan_seconds": part, "commit_seconds": part, "seconds": part}


def verdicts(rows):
    return {bar["bar"]: bar["holds"] for bar in bars(rows)}


@pytest.mark.parametrize(("p50", "p99", "held"), [(0.0014, 0.004, True), (0.0016, 0.005, False)])
def test_the_time_at_256_running_and_2000_waiting_is_judged(p50, p99, held):
    found = verdicts([row(256, 2000, p50, p99)])
    assert found == {
        "p50 seconds, 256 running, 2000 waiting": held,
        "p99 seconds, 256 running, 2000 waiting": held,
    }


def test_time_may_grow_with_what_runs_and_not_with_what_waits():
    rows = [row(64, 100, 1.0), row(64, 1000, 1.2), row(128, 100, 1.9), row(128, 1000, 2.3)]
    assert verdicts(rows) == {
        "p50 from 64 to 128 running": True,
        "p50 from 100 to 1000 waiting": True,
    }
    rows[3] = row(128, 1000, 2.5)
    assert not any(verdicts(rows).values())


def test_a_load_stays_at_its_sizes():
    load = Load(num_running=4, num_waiting=10, num_adapters=32)
    for _ in range(30):
        assert min(load.step()) >= 0.0
        load.engine.check()
        scheduler = load.engine.scheduler
        assert scheduler.num_running + scheduler.num_waiting <= 14
    assert load.engine.adapters.num_loads > 0


def test_the_script_ends_in_one_json_line(monkeypatch, capsys, tmp_path):
    output = tmp_path / "scheduler_time.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--output", str(output)])
    scheduler_time.main()
    printed = capsys.readouterr().out.splitlines()
    record = json.loads(printed[-1])
    assert record == json.loads(output.read_text())
    assert [(r["num_running"], r["num_waiting"]) for r in record["rows"]] == [(4, 8), (4, 16)]
    assert printed[0].startswith("running  waiting")


def test_the_table_has_milliseconds_and_verdicts():
    rows = [row(256, 2000, 0.0012)]
    told = table(rows, bars(rows)).splitlines()
    assert told[1].split() == ["256", "2000", "5000", *["1.20/2.00"] * 3]
    assert told[2].endswith("holds")
