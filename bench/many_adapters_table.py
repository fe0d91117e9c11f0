"""The figures of many adapters for people: tables, and the stated bars with their verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

MIN_THROUGHPUT = 0.9
MAX_INTER_TOKEN = 1.2
MAX_FIRST_TOKEN = 3.0
"""Paged over all resident, in the median over seeds; the last one at CLIFF_WIDTH."""

CLIFF_WIDTH = 2.0
MAX_GROWTH = 3.0
"""Growth from one width of the cliff to the next that still counts as smooth: adapters grow by at
most 2 between neighbours, so that a slope of p99 TTFT may have power 1.6 and not much more."""

COMPARED = ("completed_per_second", "inter_token_p99_seconds", "first_token_p99_seconds")
"""Figures whose ratio to the same requests with all adapters resident is kept, seed by seed."""

Row = dict[str, Any]


def bars(numbers: dict[str, Any], num_fit: int) -> list[dict[str, Any]]:
    """The stated bars that these numbers decide: value, limit, verdict.

    num_fit: adapters that the small pool holds. A bar at a width that was not played is left out.
    """
    rows = numbers["rows"]
    paged = [row for row in rows if row["served"] == "paged"]
    popularity = [row for row in paged if row["part"] == "popularity"]
    cliff = sorted(
        (row for row in paged if row["part"] == "cliff"), key=lambda row: row["num_adapters"]
    )
    found = []
    for row in popularity:
        ratio, name = row["over_resident"], f"{row['workload']}, {row['num_adapters']} adapters"
        kept, gap = (ratio[figure]["median"] for figure in COMPARED[:2])
        found += [
            _bar(f"{name}: throughput over resident", kept, at_least=MIN_THROUGHPUT),
            _bar(f"{name}: p99 inter-token time over resident", gap, at_most=MAX_INTER_TOKEN),
        ]
    for row in cliff:
        if row["num_adapters"] == round(CLIFF_WIDTH * num_fit):
            ratio = row["over_resident"]["first_token_p99_seconds"]["median"]
            name = f"{CLIFF_WIDTH:g} x what fits: p99 TTFT over resident"
            found.append(_bar(name, ratio, at_most=MAX_FIRST_TOKEN))
    if len(cliff) > 1:
        name = "p99 TTFT, largest growth from one width to the next"
        found.append(_bar(name, _largest_growth(cliff), at_most=MAX_GROWTH))
    failed = sum(row["num_failed"]["max"] for row in rows)
    loads = max(row["loads_per_second"]["max"] for row in rows if row["served"] == "resident")
    return [
        *found,
        _bar("failed requests", failed, at_most=0),
        _bar("loads a second with all resident", loads, at_most=0),
    ]


def table(numbers: dict[str, Any], num_fit: int) -> str:
    """Medians over seeds of every row, the cold starts, then the bars."""
    lines = [
        "  workload adapters  x fit   served  done/s  TTFT p50/p99 ms   ITL p50/p99 ms"
        "  loads/s  resident  hits  distinct  at once  failed  done  ITL  TTFT over resident"
    ]
    lines += [_traffic_line(row, num_fit) for row in numbers["rows"]]
    lines.append("  rank        tier   TTFT ms (p10 to p90)   others' ITL p99 ms quiet/meanwhile")
    lines += [_cold_line(row) for row in numbers["cold_starts"]]
    for bar in numbers["bars"]:
        limit = f"at least {bar['at_least']}" if "at_least" in bar else f"at most {bar['at_most']}"
        verdict = "holds" if bar["holds"] else "MISSED"
        lines.append(f"{bar['bar']}: {bar['value']:.3f}, {limit}: {verdict}")
    return "\n".join(lines)


def _largest_growth(cliff: Sequence[Row]) -> float:
    values: list[float] = [row["first_token_p99_seconds"]["median"] for row in cliff]
    return max(after / before for before, after in itertools.pairwise(values))


def _bar(name: str, value: float, **limit: float) -> dict[str, Any]:
    ((kind, bound),) = limit.items()
    holds = value >= bound if kind == "at_least" else value <= bound
    return {"bar": name, "value": value, **limit, "holds": holds}


def _traffic_line(row: Row, num_fit: int) -> str:
    value = {name: cell["median"] for name, cell in row.items() if "median" in _cell(cell)}
    ratio = [row["over_resident"][name]["median"] for name in COMPARED]
    return (
        f"{row['workload']:>10} {row['num_adapters']:>8} {row['num_adapters'] / num_fit:>6.1f} "
        f"{row['served']:>8} {value['completed_per_second']:>7.2f} "
        f"{_millis(value, 'first_token'):>16} {_millis(value, 'inter_token'):>16} "
        f"{value['loads_per_second']:>8.2f} {value['resident']:>9.1f} {value['hit_share']:>5.2f} "
        f"{value['distinct_requested']:>9.0f} {value['distinct_at_once']:>8.1f} "
        f"{row['num_failed']['max']:>7.0f} {ratio[0]:>5.2f} {ratio[1]:>4.2f} {ratio[2]:>5.2f}"
    )


def _cell(cell: Any) -> dict[str, Any]:
    return cell if isinstance(cell, dict) else {}


def _cold_line(row: Row) -> str:
    first = {name: 1e3 * x for name, x in row["first_token_seconds"].items()}
    quiet, gap = (1e3 * row[f"{name}_p99_seconds"]["median"] for name in ("quiet_gap", "gap"))
    return (
        f"{row['rank']:>6} {row['tier']:>11} {first['median']:>9.1f} "
        f"({first['p10']:.1f} to {first['p90']:.1f}) {f'{quiet:.1f}/{gap:.1f}':>22}"
    )


def _millis(value: dict[str, float], kind: str) -> str:
    p50, p99 = (1e3 * value[f"{kind}_{p}_seconds"] for p in ("p50", "p99"))
    return f"{p50:.0f}/{p99:.0f}"
