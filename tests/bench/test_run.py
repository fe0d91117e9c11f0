"""The suite: its command lines, and all of it at its smallest size against a real server."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run

ROOT = Path(__file__).resolve().parents[2]


def options(**given):
    return argparse.Namespace(**{"quick": False, "model": None} | given)


def test_a_script_is_told_device_output_and_model(tmp_path):
    words = run.command("closed_loop", "cuda", tmp_path, options(model="m", quick=True))
    assert words[1:] == [
        "-m", "bench.closed_loop", "--device", "cuda",
        "--output", str(tmp_path / "closed_loop.json"), "--quick", "--model", "m",
    ]  # fmt: skip
    assert "--model" not in run.command("kernel_alternatives", "cpu", tmp_path, options(model="m"))


def test_a_failed_script_keeps_no_other_from_running(tmp_path, monkeypatch, capsys):
    ran = []

    def subprocess_run(words, **_):
        ran.append(words[2])
        return argparse.Namespace(returncode=int(words[2] == "bench.start"))

    monkeypatch.setattr(run.subprocess, "run", subprocess_run)
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "--directory", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        run.main()
    assert ran == [f"bench.{name}" for name in run.SCRIPTS]
    assert "failed: start\n" in capsys.readouterr().err


def test_an_unknown_script_is_refused_with_those_that_are_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "closed_lop"])
    with pytest.raises(SystemExit):
        run.main()
    assert "the scripts are kernel_alternatives, start" in capsys.readouterr().err


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Where `python -m bench.run --quick` wrote its records and plots."""
    directory = tmp_path_factory.mktemp("results")
    words = [sys.executable, "-m", "bench.run", "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*words, "--directory", str(directory)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def record(suite, name):
    return json.loads((suite / f"{name}.json").read_text())


@pytest.mark.slow
def test_the_whole_suite_writes_a_record_of_each_script_and_the_plots(suite):
    found = {path.name for path in suite.iterdir()}
    assert found == {f"{name}.json" for name in run.SCRIPTS} | {
        "retention.png", "throughput.png", "ttft.png", "kernels.png",
    }  # fmt: skip
    for name in run.SCRIPTS:
        assert record(suite, name)["bench"] == name


@pytest.mark.slow
def test_the_closed_loop_has_every_case_and_holds_answers_to_dense_arithmetic(suite):
    found = record(suite, "closed_loop")
    cases = [(row["concurrency"], row["case"]) for row in found["rows"]]
    assert cases == [
        (n, case) for n in (1, 2) for case in ("base", "1 x r8", "2 x r8", "2 mixed")
    ]  # fmt: skip
    assert found["check"]["distance_to_dense"] < found["check"]["distance_to_base"] / 2
    assert [bar["bar"] for bar in found["bars"]] == [
        "base with idle adapters over without",
        "p99 inter-token time beside a long prompt over quiet",
    ]
    assert all(0 < row["retention_roof"] <= 1 for row in found["rows"])


@pytest.mark.slow
def test_http_load_answers_every_request_of_adapters_and_base(suite):
    rows = record(suite, "http_load")["rows"]
    points = [(row["workload"], row["load"], row["served"]) for row in rows]
    assert points == [
        (workload, load, served)
        for workload in ("slora-1", "punica-skewed")
        for load in (0.5, 1.0)
        for served in ("adapters", "base")
    ]
    for row in rows:
        assert row["num_failed"]["max"] == 0
        assert (row["distinct_requested"]["median"] > 0) == (row["served"] == "adapters")


@pytest.mark.slow
def test_every_start_answered(suite):
    found = record(suite, "start")
    assert found["first_start_seconds"] > 0
    assert found["peak_bytes"] > 0
