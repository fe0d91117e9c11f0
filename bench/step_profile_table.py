"""The step profile for people: a table for each phase, and the stated bars with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

SCHEDULE, REST = "plan + commit", "rest"

BAR_ROWS = 32
MAX_NON_GEMM_SHARE = 0.25
MIN_GEMM_RATE = 0.85


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stated bars, for the base model's decode step of BAR_ROWS rows; none without it."""
    case = ("decode", BAR_ROWS, 0)
    for r in rows:
        if (r["phase"], r["num_rows"], r["num_adapters"]) == case:
            share, rate = r["non_gemm_share"]["median"], r["gemm_rate_of_alone"]["median"]
            name = f"of a {BAR_ROWS}-row decode step, base model"
            return [
                {
                    "bar": f"non-GEMM share {name}",
                    "value": share,
                    "at_most": MAX_NON_GEMM_SHARE,
                    "holds": share <= MAX_NON_GEMM_SHARE,
                },
                {
                    "bar": f"GEMM rate over the same shapes alone, {name}",
                    "value": rate,
                    "at_least": MIN_GEMM_RATE,
                    "holds": rate >= MIN_GEMM_RATE,
                },
            ]
    return []


def report(numbers: dict[str, Any]) -> str:
    """A table for each phase, then the bars."""
    lines = []
    for _, rows in groupby(numbers["rows"], lambda r: r["phase"]):
        lines += [*table(list(rows)), ""]
    for bar in numbers["bars"]:
        limit = f"at least {bar['at_least']}" if "at_least" in bar else f"at most {bar['at_most']}"
        verdict = "holds" if bar["holds"] else "MISSED"
        lines.append(f"{bar['bar']}: {bar['value']:.3f}, {limit}: {verdict}")
    return "\n".join(lines).rstrip()


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Milliseconds and share of each operation, a column for each step of one phase."""
    labels = list(dict.fromkeys(label for r in rows for label in r["operations"]))
    labels.append(labels.pop(labels.index(REST)))
    operations = [[r["operations"].get(label) for r in rows] for label in labels]
    return [
        _line(f"{rows[0]['phase']}: rows", [r["num_rows"] for r in rows]),
        _line("distinct adapters", [r["num_adapters"] for r in rows]),
        _line("", ["ms  share" for _ in rows]),
        *(
            _line(label, [f and f"{1e3 * f['seconds']:.2f} {f['share']:>6.1%}" for f in found])
            for label, found in zip(labels, operations, strict=True)
        ),
        _line("step", [_millis(r["step_seconds"]) for r in rows]),
        _line("step with timers", [_millis(r["timed_step_seconds"]) for r in rows]),
        _line("non-GEMM share", [f"{r['non_gemm_share']['median']:.1%}" for r in rows]),
        _line("GEMM rate over alone", [f"{r['gemm_rate_of_alone']['median']:.1%}" for r in rows]),
        _line("GEMM GFLOP/s", [f"{r['gemm_flops_per_second'] / 1e9:.0f}" for r in rows]),
    ]


def _line(title: str, cells: Sequence[object]) -> str:
    return f"{title:<24}" + "".join(f"{'-' if c is None else c:>15}" for c in cells)


def _millis(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.2f}" + " " * 7  # above the milliseconds of operations
