"""Draws the simulation's results; every figure says what it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.plots import ADAPTERS, BASE, BLUES, STYLE
from bench.simulation.machine import SIMULATED

Rows = Sequence[dict[str, Any]]


def draw(experiments: dict[str, Any], directory: Path) -> list[Path]:
    """Write simulation_NAME.png of every experiment that has a plot; the paths written."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            if name in experiments:
                path = directory / f"simulation_{name}.png"
                figure = plot(experiments[name]["rows"])
                figure.suptitle(f"{experiments[name]['title']}\n{SIMULATED}", fontsize=9)
                figure.savefig(path, metadata={"Software": None})
                drawn.append(path)
    return drawn


def slora(rows: Rows) -> Figure:
    """A panel a setting: completed requests a second against adapters, dashed the base alone."""
    plain = [row for row in rows if row["variant"] == "q,k,v,o"]
    settings = list(dict.fromkeys(row["setting"] for row in plain))
    figure = Figure(figsize=(3.4 * len(settings), 3.8), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        of_setting = [row for row in plain if row["setting"] == setting]
        rates = sorted({row["rate"] for row in of_setting})
        for colour, rate in zip((BLUES[1], BLUES[3]), rates, strict=True):
            shown = [row for row in of_setting if row["rate"] == rate]
            base = [row for row in shown if row["adapters"] == 0]
            many = [row for row in shown if row["adapters"] > 0]
            _band(panel, many, "adapters", "completed_per_second", colour, f"{rate}/s offered")
            for row in base:
                done = row["completed_per_second"]["median"]
                panel.axhline(done, color=colour, linestyle="--", linewidth=1)
        panel.set_title(setting, fontsize=10)
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("adapters (dashed: base only)")
    panels[0].set_ylabel("completed requests/s")
    panels[0].legend()
    return figure


def slot_cliff(rows: Rows) -> Figure:
    """Time to first token against adapters over slots."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for p, colour in (("p50", BLUES[1]), ("p99", ADAPTERS)):
        _band(axes, rows, "width", f"first_token_{p}_seconds", colour, p)
    axes.set_yscale("log")
    axes.set_xlabel("active adapters / slots")
    axes.set_ylabel("time to first token, s")
    axes.legend()
    return figure


def memory(rows: Rows) -> Figure:
    """A panel for each number of adapters: throughput against the pool, one line a split."""
    counts = sorted({row["adapters"] for row in rows})
    figure = Figure(figsize=(3.4 * len(counts), 3.8), layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    splits = sorted({row["split"] for row in rows})
    for panel, count in zip(panels, counts, strict=True):
        for colour, split in zip((ADAPTERS, BLUES[1], BLUES[3]), splits, strict=True):
            shown = [row for row in rows if (row["adapters"], row["split"]) == (count, split)]
            label = f"{split:.0%} for adapters" if split else "unified"
            _band(panel, shown, "pool", "completed_per_second", colour, label)
        panel.set_title(f"{count} adapters", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("pool, share of the machine's")
    panels[0].set_ylabel("completed requests/s")
    panels[0].legend()
    return figure


def fairness(rows: Rows) -> Figure:
    """p99 of the light tenants' time to first token, alone and beside a heavy one."""
    shown = [row for row in rows if row["light_p99_seconds"]["median"] is not None]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['traffic']}\n{row['order']}" for row in shown]
    for p, colour, shift in (("p50", BLUES[1], -0.2), ("p99", ADAPTERS, 0.2)):
        heights = [row[f"light_{p}_seconds"]["median"] for row in shown]
        places = [i + shift for i in range(len(shown))]
        axes.bar(places, heights, 0.4, color=colour, label=p)
    axes.set_xticks(range(len(shown)), names, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("light tenants' time to first token, s", color=BASE)
    axes.legend()
    return figure


PLOTS: dict[str, Callable[[Rows], Figure]] = {
    "slora": slora,
    "slot_cliff": slot_cliff,
    "memory": memory,
    "fairness": fairness,
}


def _band(axes: Axes, rows: Rows, label: str, figure: str, colour: str, name: str) -> None:
    """Medians as a line, least to most as a band."""
    places = [row[label] for row in rows]
    low, middle, high = ([row[figure][p] for row in rows] for p in ("min", "median", "max"))
    axes.plot(places, middle, marker="o", color=colour, label=name)
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
