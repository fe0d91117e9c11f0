"""`python -m bench.simulation` writes what it found, and says everywhere that it is simulated."""

from __future__ import annotations

import json

import pytest

from bench.simulation import memory_split, popularity, slora_table
from bench.simulation.__main__ import EXPERIMENTS, main
from bench.simulation.machine import SIMULATED
from bench.simulation.plots import PLOTS, draw
from bench.simulation.tables import COLUMNS, table, verdict

PNG = b"\x89PNG\r\n"


def run_main(monkeypatch, directory, *words):
    monkeypatch.setattr(
        "sys.argv", ["bench.simulation", *words, "--quick", "--output", str(directory)]
    )
    main()
    return json.loads((directory / "simulation.json").read_text())


def test_the_command_writes_json_tables_and_plots(monkeypatch, tmp_path, capsys):
    record = run_main(monkeypatch, tmp_path, "slot_cliff", "fairness")
    assert record["nature"] == SIMULATED
    assert record["experiments"].keys() == {"slot_cliff", "fairness"}
    assert [row["width"] for row in record["experiments"]["slot_cliff"]["rows"]] == [
        0.5, 1.0, 1.5, 2.0, 4.0,
    ]  # fmt: skip
    told = (tmp_path / "simulation.md").read_text()
    assert told.count(SIMULATED) == 1 + len(record["experiments"])
    assert "NVIDIA A100 SXM 80 GB" in told
    assert "Assumed: 60% of the peak of products" in told
    for name in ("slot_cliff", "fairness"):
        assert (tmp_path / f"simulation_{name}.png").read_bytes().startswith(PNG)
    assert str(tmp_path) not in (tmp_path / "simulation.json").read_text() + told
    printed = capsys.readouterr().err
    assert "slot_cliff: p99 TTFT, twice the slots over all resident" in printed


def test_a_run_can_be_repeated_to_the_last_digit(monkeypatch, tmp_path):
    first, second = (
        run_main(monkeypatch, tmp_path / name, "slot_cliff")["experiments"] for name in "ab"
    )
    assert first == second


def test_an_unknown_experiment_is_refused_by_name(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="cliffs: the experiments are slora, slot_cliff, memory"):
        run_main(monkeypatch, tmp_path, "cliffs")


def test_every_experiment_has_a_table():
    assert EXPERIMENTS.keys() == COLUMNS.keys()
    assert PLOTS.keys() <= EXPERIMENTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [slora_table, memory_split, popularity])
def test_an_experiment_fills_its_table_and_its_plot(experiment, tmp_path):
    found = experiment.run([0, 1], num_requests=20)
    record = found.to_json()
    lines = table(found.name, record["rows"]).splitlines()
    assert len(lines) == 2 + len(found.rows)
    assert len({tuple(row.labels.items()) for row in found.rows}) == len(found.rows)
    assert all(path.read_bytes().startswith(PNG) for path in draw({found.name: record}, tmp_path))


def test_a_verdict_names_value_spread_and_limit():
    bar = {"bar": "kept", "value": {"median": 0.9, "min": 0.8, "max": 1.0}, "holds": False}
    assert verdict({**bar, "at_least": 0.95}) == "kept: 0.9 (0.8 to 1), at least 0.95: **MISSED**"
    nothing = {"median": None, "min": None, "max": None}
    assert verdict({**bar, "value": nothing, "at_most": 3.0}).startswith("kept: - (- to -)")


def test_a_cell_shows_the_spread_where_seeds_differ():
    same, spread = ({"median": 2, "min": a, "max": 3 - a + 1} for a in (2, 1))
    row = {"pool": 0.6, "adapters": 200, "split": 0.0}
    figures = {column.key: same for column in COLUMNS["memory"] if column.form}
    cells = table("memory", [{**row, **figures, "steady_per_second": spread}]).splitlines()[2]
    assert cells.startswith("| 0.6 | 200 | 0 | 2.00 | 2.00 (1.00 to 3.00) |")
