"""Every plot is drawn from the figures that are there, and shows them."""

from __future__ import annotations

import json
import sys

import pytest

from bench.plots import draw_all, kernels, main, retention, throughput, ttft

PNG = b"\x89PNG\r\n"
MACHINE = {"device": "CPU", "cores": 2, "commit": "abc", "dtype": "bfloat16"}


def spread(value):
    return {"median": value, "p10": 0.9 * value, "p90": 1.1 * value}


def closed_loop_row(clients, num_adapters, ranks, rate, kept):
    return {
        "case": f"{num_adapters}" if num_adapters else "base",
        "concurrency": clients,
        "num_adapters": num_adapters,
        "ranks": ranks,
        "output_tokens_per_second": spread(rate),
        "retention": spread(kept),
        "retention_roof": 0.97 - num_adapters / 400,
    }


CLOSED_LOOP = {
    **MACHINE,
    "model": "tiny",
    "parameters": {"rank": 16, "quick": False},
    "rows": [
        closed_loop_row(clients, n, ranks, clients * 20.0 * kept, kept)
        for clients in (1, 8, 32)
        for n, ranks, kept in [
            (0, [], 1.0),
            (1, [16], 0.95),
            (8, [16], 0.9),
            (64, [16], 0.8),
            (64, [8, 64], 0.7),
        ]
    ],
}

HTTP_LOAD = {
    **MACHINE,
    "model": "tiny",
    "parameters": {"quick": True},
    "rows": [
        {
            "workload": workload,
            "load": load,
            "rate": 4 * load,
            "served": served,
            "first_token_p50_seconds": {"median": 0.1 + load},
            "first_token_p99_seconds": {"median": 0.5 + 2 * load},
        }
        for workload in ("slora-1", "punica-uniform", "zipf-1.5", "zipf-1", "slora-0.3")
        for load in (0.5, 0.8, 1.0)
        for served in ("adapters", "base")
    ],
}

KERNELS = {
    **MACHINE,
    "parameters": {"quick": False},
    "rows": [
        {
            "num_tokens": n,
            "num_adapters": n,
            "ranks": [rank],
            "microseconds": {
                "base": spread(10.0 + n),
                "ours": spread(1.0 * n),
                "loop": spread(9.0 * n),
                "gather": spread(5.0 * n),
                "padded": spread(4.0 * n),
                "merged": spread(20.0) if n < 8 else None,
            },
        }
        for n in (1, 4, 8)
        for rank in (8, 16)
    ],
}


@pytest.fixture
def directory(tmp_path):
    for name, record in (
        ("closed_loop", CLOSED_LOOP),
        ("http_load", HTTP_LOAD),
        ("kernel_alternatives", KERNELS),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return tmp_path


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_every_plot_is_a_png_beside_its_figures(directory):
    drawn = draw_all(directory)
    assert [path.name for path in drawn] == [
        "retention.png", "throughput.png", "ttft.png", "kernels.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in drawn)


def test_figures_that_are_not_there_are_not_drawn(directory):
    (directory / "closed_loop.json").unlink()
    assert [path.name for path in draw_all(directory)] == ["ttft.png", "kernels.png"]


def test_retention_shows_the_medians_and_the_roof():
    (axes,) = retention(CLOSED_LOOP).axes
    assert lines(axes)["32 clients"] == [[1, 0.95], [8, 0.9], [64, 0.8]]
    dashed = [x.get_xydata().tolist() for x in axes.get_lines() if x.get_linestyle() == "--"]
    assert [[1, 0.97 - 1 / 400], [8, 0.97 - 8 / 400], [64, 0.97 - 64 / 400]] in dashed
    diamonds = [x.get_xydata().tolist() for x in axes.get_lines() if x.get_marker() == "D"]
    assert [[64, 0.7]] in diamonds


def test_throughput_shows_each_number_of_clients():
    (axes,) = throughput(CLOSED_LOOP).axes
    assert lines(axes)["8 clients"] == [[1, 152.0], [8, 144.0], [64, 128.0]]


def test_ttft_has_a_panel_for_each_workload():
    figure = ttft(HTTP_LOAD)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [
        "slora-1", "punica-uniform", "zipf-1.5", "zipf-1", "slora-0.3",
    ]  # fmt: skip
    assert lines(shown[0])["adapters p99"] == [[0.5, 1.5], [0.8, 2.1], [1.0, 2.5]]
    assert "--quick: no measurement" in figure.get_suptitle()


def test_kernels_are_those_of_rank_16_and_leave_gaps_where_nothing_was_timed():
    (axes,) = kernels(KERNELS).axes
    assert lines(axes)["ours"] == [[1, 1], [4, 4], [8, 8]]
    assert lines(axes)["merged"] == [[1, 20], [4, 20]]


def test_a_directory_without_figures_is_told_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "run the scripts with --output first" in capsys.readouterr().err
