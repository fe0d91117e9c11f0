"""The measured rows as Markdown: tokens per second, manylora over each of the others, latencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OURS = "manylora"
Row = dict[str, Any]


def markdown(numbers: dict[str, Any]) -> str:
    """The tables of a record of `bench.rivals.run`."""
    rows: list[Row] = numbers["rows"]
    titles = {name: rival["title"] for name, rival in numbers["rivals"].items()}
    tables = [
        "Output tokens per second, by requests in flight:",
        _by_concurrency(rows, titles, lambda row: f"{_rate(row):.0f}"),
        "manylora's output tokens per second over each one's, for the same requests:",
        _by_concurrency(rows, titles, lambda row: _ratio(row, _same(row, rows))),
        "manylora's with the most adapters over each one's with adapters, as many in flight:",
        _by_concurrency(
            [row for row in rows if row["adapters"]],
            titles,
            lambda row: _ratio(row, _with_most_adapters(row, rows)),
        ),
        "Milliseconds to the first token and between tokens:",
        _latencies(rows, titles),
    ]
    tables += [f"Failed: {failure}" for failure in numbers["failures"]]
    return "\n\n".join(tables) + "\n"


def _rate(row: Row) -> float:
    rate: float = row["output_tokens_per_second"]["median"]
    return rate


def _ratio(row: Row, ours: Row | None) -> str:
    return f"{_rate(ours) / _rate(row):.2f}" if ours else ""


def _same(row: Row, rows: list[Row]) -> Row | None:
    """Our row of the same case."""
    return next((r for r in _ours(row, rows) if r["adapters"] == row["adapters"]), None)


def _with_most_adapters(row: Row, rows: list[Row]) -> Row | None:
    """Our row with as many requests in flight and the most adapters."""
    return max(_ours(row, rows), key=lambda r: int(r["adapters"]), default=None)


def _ours(row: Row, rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["rival"] == OURS and r["concurrency"] == row["concurrency"]]


def _by_concurrency(rows: list[Row], titles: dict[str, str], cell: Callable[[Row], str]) -> str:
    concurrency = sorted({row["concurrency"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: bool(row["adapters"])):  # the base first
        lines.setdefault(_label(row, titles), {})[row["concurrency"]] = cell(row)
    return _table(
        ("", "adapters", *(str(number) for number in concurrency)),
        [(*label, *(cells.get(n, "") for n in concurrency)) for label, cells in lines.items()],
    )


def _latencies(rows: list[Row], titles: dict[str, str]) -> str:
    keys = ("ttft_p50_ms", "inter_token_p50_ms", "inter_token_p99_ms")
    head = ("", "adapters", "in flight", "first token p50", "between p50", "between p99")
    return _table(
        head,
        [
            (
                *_label(row, titles),
                str(row["concurrency"]),
                *(f"{row[key]['median']:.0f}" for key in keys),
            )
            for row in sorted(rows, key=lambda row: (bool(row["adapters"]), row["concurrency"]))
        ],
    )


def _label(row: Row, titles: dict[str, str]) -> tuple[str, str]:
    variant = f", {row['variant']}" if row["variant"] else ""
    return f"{titles[row['rival']]}{variant}", str(row["adapters"] or "base only")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", "---", *("---:" for _ in head[2:]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
