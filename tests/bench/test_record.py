"""The line that every script ends in, and the flags that they share."""

from __future__ import annotations

import json

import pytest

from bench.record import (
    add_model_flag,
    arguments,
    changed,
    engine_settings,
    finish,
    percentiles,
    spread,
)


def parsed(*words):
    parser = arguments("What is it?")
    add_model_flag(parser)
    return parser.parse_args(words)


def test_a_record_says_where_it_comes_from_and_is_one_json_line(tmp_path, capsys):
    options = parsed("--quick", "--output", str(tmp_path / "deep" / "x.json"))
    record = finish("x", "cpu", options, {"rate": 1.23456789, "rows": [{"p": float("nan")}]})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == json.loads((tmp_path / "deep" / "x.json").read_text()) == record
    assert record["rate"] == 1.2346
    assert record["rows"] == [{"p": None}]
    assert {"commit", "versions", "device", "cores", "command"} <= record.keys()
    assert "torch" in record["versions"]
    assert record["parameters"]["quick"] is True
    assert "output" not in record["parameters"]


def test_a_record_tells_its_command_and_no_path_of_this_machine(monkeypatch):
    words = ["/here/bin/python", "-m", "bench.x", "--output", "/here/x.json", "--rounds", "3"]
    monkeypatch.setattr("sys.orig_argv", [*words, "--output=/here/y.json"])
    record = finish("x", "cpu", parsed(), {})
    assert record["command"] == ["python", "-m", "bench.x", "--rounds", "3"]


def test_settings_of_the_server_come_from_their_variables_and_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYLORA_MAX_BATCHED_TOKENS", "256")
    settings = engine_settings(parsed(), tmp_path, max_num_seqs=5)
    assert settings.model == "embedded"
    assert changed(settings) == {
        "max_batched_tokens": 256,
        "max_num_seqs": 5,
        "shipped_adapters": False,
    }


def test_quick_takes_a_tiny_model_unless_another_is_named(tmp_path):
    tiny = engine_settings(parsed("--quick"), tmp_path).model
    assert json.loads((tmp_path / "tiny-model" / "config.json").read_text())["hidden_size"] == 32
    assert tiny == str(tmp_path / "tiny-model")
    assert engine_settings(parsed("--quick", "--model", "other"), tmp_path).model == "other"


def test_spread_is_median_and_outer_tenths():
    assert spread([float(x) for x in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}


def test_percentiles_of_nothing_are_no_numbers():
    assert percentiles([], 50, 99) == pytest.approx(
        {"p50": float("nan"), "p99": float("nan")}, nan_ok=True
    )
