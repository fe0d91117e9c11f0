"""The simulation's results for people, in Markdown: assumptions, tables, bars with verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.simulation.machine import SIMULATED

Record = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: a label of the rows, or a figure with its format."""

    title: str
    key: str
    form: str = ""  # empty: a label
    scale: float = 1.0


RATES = (
    Column("done/s", "completed_per_second", ".2f"),
    Column("steady/s", "steady_per_second", ".2f"),
)
LATENCIES = (
    Column("TTFT p50 s", "first_token_p50_seconds", ".3f"),
    Column("TTFT p99 s", "first_token_p99_seconds", ".3f"),
    Column("ITL p50 ms", "inter_token_p50_seconds", ".0f", 1e3),
    Column("ITL p99 ms", "inter_token_p99_seconds", ".0f", 1e3),
    Column("attained", "attainment", ".3f"),
)
ADAPTERS = (
    Column("distinct asked for", "distinct_requested", ".0f"),
    Column("distinct a step", "distinct_per_step", ".0f"),
    Column("running", "running_per_step", ".0f"),
    Column("loads/s", "loads_per_second", ".1f"),
    Column("adapters' time", "adapter_share_of_time", ".1%"),
)
MEMORY = (
    Column("running", "running_per_step", ".0f"),
    Column("loads/s", "loads_per_second", ".1f"),
    Column("preempted", "num_preemptions", ".0f"),
)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "slora": (
        Column("setting", "setting"),
        Column("targets", "variant"),
        Column("offered/s", "rate"),
        Column("adapters", "adapters"),
        *RATES,
        *LATENCIES,
        *ADAPTERS,
    ),
    "slot_cliff": (
        Column("adapters / slots", "width"),
        Column("adapters", "adapters"),
        Column("offered/s", "rate"),
        *RATES[:1],
        *LATENCIES,
        *ADAPTERS,
    ),
    "memory": (
        Column("pool", "pool"),
        Column("adapters", "adapters"),
        Column("for adapters", "split"),
        *RATES,
        *LATENCIES[:2],
        *MEMORY,
    ),
    "popularity": (
        Column("machine", "machine"),
        Column("Zipf", "exponent"),
        Column("base", "base_share"),
        Column("offered/s", "rate"),
        *RATES[:1],
        *LATENCIES,
        *ADAPTERS,
    ),
    "fairness": (
        Column("traffic", "traffic"),
        Column("order", "order"),
        Column("offered/s", "rate"),
        *RATES[:1],
        Column("light p50 s", "light_p50_seconds", ".3f"),
        Column("light p99 s", "light_p99_seconds", ".3f"),
        Column("heavy p99 s", "heavy_p99_seconds", ".1f"),
        Column("largest gap", "service_gap", ".0f"),
        Column("bound", "gap_bound", ".0f"),
    ),
}
"""What the table of each experiment shows; the JSON has everything."""


def markdown(record: Record) -> str:
    """The whole report."""
    parts = [
        "# Simulation at the scale of a GPU",
        f"**{SIMULATED}.** The scheduler, the page pool, the KV cache and the adapters' residency "
        "are the server's own. docs/simulation.md tells the model and how to read this.",
        f"Medians over {len(record['seeds'])} seeds, least to most where they differ; commit "
        f"{record['commit']}, `{' '.join(record['command'])}`.",
        "\n".join(f"- {text}." for text in record["machines"]),
    ]
    for name, found in record["experiments"].items():
        parts += [f"## {found['title']}", f"*{SIMULATED}.*", table(name, found["rows"])]
        parts += ["\n".join(f"- {verdict(bar)}" for bar in found["bars"])] if found["bars"] else []
    return "\n\n".join(parts) + "\n"


def table(name: str, rows: Sequence[Record]) -> str:
    """One experiment's rows."""
    columns = COLUMNS[name]
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[_cell(column, row) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verdict(bar: Record) -> str:
    """One bar in one line."""
    side, limit = (
        ("at least", bar["at_least"]) if "at_least" in bar else ("at most", bar["at_most"])
    )
    middle, least, most = (_said(bar["value"][part]) for part in ("median", "min", "max"))
    said = "holds" if bar["holds"] else "MISSED"
    return f"{bar['bar']}: {middle} ({least} to {most}), {side} {limit:.4g}: **{said}**"


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cell(column: Column, row: Record) -> str:
    if not column.form:
        return (
            f"{row[column.key]:g}" if isinstance(row[column.key], float) else str(row[column.key])
        )
    middle, least, most = (
        _number(row[column.key][part], column) for part in ("median", "min", "max")
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def _number(value: float | None, column: Column) -> str:
    return "-" if value is None else f"{value * column.scale:{column.form}}"
