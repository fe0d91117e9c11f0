"""Draws what the other scripts measured: PNGs from the JSON files of one directory.

retention.png    what a case keeps of the base model's rate, against distinct adapters, and its roof
throughput.png   output tokens per second against distinct adapters
ttft.png         time to first token as the offered load grows, adapters beside base
kernels.png      microseconds of each way to compute adapters, against tokens
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

RESULTS = Path(__file__).resolve().parent / "results"

BLUES = ("#9ecae1", "#6baed6", "#2171b5", "#08306b")  # more clients, darker
ADAPTERS, BASE = "#d95f02", "#4d4d4d"
WAY_COLOURS = {
    "ours": "#d95f02",
    "loop": "#7570b3",
    "gather": "#1b9e77",
    "padded": "#e7298a",
    "merged": "#a6761d",
    "base": BASE,
}
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
    "savefig.dpi": 144,
}

Record = dict[str, Any]


def main() -> None:
    """Draw every plot whose figures are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?", default=RESULTS)
    directory = parser.parse_args().directory
    drawn = draw_all(directory)
    if not drawn:
        sys.stderr.write(
            f"{directory} has none of {', '.join(sorted({name for name, _ in PLOTS.values()}))}: "
            "run the scripts with --output first\n"
        )
        sys.exit(1)
    for path in drawn:
        print(path)


def draw_all(directory: Path) -> list[Path]:
    """Write each plot beside the JSON file that it is drawn from; the paths written."""
    drawn = []
    with mpl.rc_context(STYLE):
        for plot, (source, draw) in PLOTS.items():
            if (directory / source).exists():
                figure = draw(json.loads((directory / source).read_text()))
                figure.savefig(directory / plot, metadata={"Software": None})
                drawn.append(directory / plot)
    return drawn


def retention(record: Record) -> Figure:
    """Lines for numbers of clients, their roofs dashed; diamonds are adapters of mixed ranks."""
    figure, axes = _figure(record, "Share of the base model's rate that adapters keep")
    for colour, clients, rows in _by_clients(record):
        plain = [row for row in rows if len(row["ranks"]) == 1]
        _spread_line(axes, plain, "retention", colour, _clients(clients))
        roofs = [(row["num_adapters"], row["retention_roof"]) for row in plain]
        axes.plot(*zip(*roofs, strict=True), color=colour, linestyle="--", linewidth=1)
        for row in rows:
            if len(row["ranks"]) > 1:
                place = (row["num_adapters"], row["retention"]["median"])
                axes.plot(*place, "D", color=colour, fillstyle="none")
    axes.plot([], [], "--", color=BASE, linewidth=1, label="roof: arithmetic and memory alone")
    axes.plot([], [], "D", color=BASE, fillstyle="none", label="mixed ranks")
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("adapters / base only")
    return _with_adapter_axis(figure, axes, record)


def throughput(record: Record) -> Figure:
    """Lines for numbers of clients; the base model's rate of each is dotted."""
    figure, axes = _figure(record, "Output tokens per second")
    for colour, clients, rows in _by_clients(record):
        plain = [row for row in rows if len(row["ranks"]) == 1]
        _spread_line(axes, plain, "output_tokens_per_second", colour, _clients(clients))
        for row in rows:
            if row["case"] == "base":
                rate = row["output_tokens_per_second"]["median"]
                axes.axhline(rate, color=colour, linestyle=":", linewidth=1)
    axes.plot([], [], ":", color=BASE, linewidth=1, label="base model only")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("output tokens/s")
    return _with_adapter_axis(figure, axes, record)


def ttft(record: Record) -> Figure:
    """A panel for each workload: p50 and p99 of adapters and of the same requests to the base."""
    names = list(dict.fromkeys(row["workload"] for row in record["rows"]))
    num_columns = min(4, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(2.5 + 2.6 * num_columns, 1.4 + 2.3 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    by_load = all(row["load"] is not None for row in record["rows"])
    for panel, name in zip(panels, names, strict=False):
        for served, colour in (("adapters", ADAPTERS), ("base", BASE)):
            rows = [r for r in record["rows"] if (r["workload"], r["served"]) == (name, served)]
            loads = [row["load" if by_load else "rate"] for row in rows]
            for p, line in (("p50", "-"), ("p99", "--")):
                times = [row[f"first_token_{p}_seconds"]["median"] for row in rows]
                panel.plot(loads, times, line, marker="o", color=colour, label=f"{served} {p}")
        panel.set_title(name, fontsize=10)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.supxlabel(f"offered load, {'share of saturation' if by_load else 'requests/s'}")
    figure.supylabel("time to first token, s")
    figure.suptitle(f"Time to first token across load\n{_caption(record)}", fontsize=11)
    return figure


def kernels(record: Record) -> Figure:
    """Every token its own adapter, of rank 16 or the lowest that was measured."""
    ranks = {row["ranks"][0] for row in record["rows"] if len(row["ranks"]) == 1}
    rank = 16 if 16 in ranks else min(ranks)
    rows = [
        row
        for row in record["rows"]
        if row["ranks"] == [rank] and row["num_adapters"] == row["num_tokens"]
    ]
    figure, axes = _figure(record, f"One layer, an adapter of rank {rank} for every token")
    for way, colour in WAY_COLOURS.items():
        there = [row for row in rows if row["microseconds"][way] is not None]
        tokens = [row["num_tokens"] for row in there]
        micros = [row["microseconds"][way]["median"] for row in there]
        label = f"{way} linear" if way == "base" else way
        axes.plot(tokens, micros, marker="o", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds")
    axes.legend()
    return figure


PLOTS: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "retention.png": ("closed_loop.json", retention),
    "throughput.png": ("closed_loop.json", throughput),
    "ttft.png": ("http_load.json", ttft),
    "kernels.png": ("kernel_alternatives.json", kernels),
}
"""Each plot, the file that it is drawn from, and what draws it."""


def _figure(record: Record, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title}\n{_caption(record)}", fontsize=11)
    return figure, axes


def _caption(record: Record) -> str:
    model = f"{record['model']}, " if "model" in record else ""
    quick = ", --quick: no measurement" if record["parameters"]["quick"] else ""
    return (
        f"{model}{record['dtype']}, {record['device']}, {record['cores']} cores, "
        f"{record['commit']}{quick}"
    )


def _by_clients(record: Record) -> list[tuple[str, int, list[Record]]]:
    """A colour, a number of clients, and its rows."""
    numbers = list(dict.fromkeys(row["concurrency"] for row in record["rows"]))
    darkness = [round(i * (len(BLUES) - 1) / max(len(numbers) - 1, 1)) for i in range(len(numbers))]
    return [
        (BLUES[dark], n, [r for r in record["rows"] if r["concurrency"] == n])
        for dark, n in zip(darkness, numbers, strict=True)
    ]


def _clients(number: int) -> str:
    return f"{number} client" + ("" if number == 1 else "s")


def _spread_line(axes: Axes, rows: Sequence[Record], figure: str, colour: str, label: str) -> None:
    """Medians as a line, p10 to p90 as a band."""
    counts = [row["num_adapters"] for row in rows]
    low, middle, high = ([row[figure][p] for row in rows] for p in ("p10", "median", "p90"))
    axes.plot(counts, middle, marker="o", color=colour, label=label)
    axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)


def _with_adapter_axis(figure: Figure, axes: Axes, record: Record) -> Figure:
    axes.set_xscale("log", base=2)
    counts = sorted({row["num_adapters"] for row in record["rows"]} - {0})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel(f"distinct adapters (rank {record['parameters']['rank']})")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
