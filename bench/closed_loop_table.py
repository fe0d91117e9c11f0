"""The closed loop's figures for people: a table, and the stated bars with their verdicts."""

from __future__ import annotations

from typing import Any

RETENTION_BARS = ((32, "8 x r16", 0.92), (32, "32 x r16", 0.85), (32, "64 mixed", 0.75))
"""Clients, case, and the least share of the base model's rate."""

MIN_SHARE_OF_ROOF = 0.75  # of the base model at 8 and at 32 clients
MIN_IDLE_RATIO = 0.99
MAX_LONG_PROMPT_RATIO = 2.5


def bars(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """The stated bars that these numbers decide: value, limit, verdict; only of cases that ran."""
    rows = {(r["concurrency"], r["case"]): r for r in numbers["rows"]}
    idle, ratio = numbers["idle_adapters"]["ratio"]["median"], numbers["long_prompt"]["ratio"]
    found = [
        (f"base at {n}, share of the roof", rows[n, "base"]["share_of_roof"], MIN_SHARE_OF_ROOF)
        for n in (8, 32)
        if (n, "base") in rows
    ]
    found += [
        (f"{case} at {n}, retention", rows[n, case]["retention"]["median"], least)
        for n, case, least in RETENTION_BARS
        if (n, case) in rows
    ]
    found.append(("base with idle adapters over without", idle, MIN_IDLE_RATIO))
    judged = [_bar(name, value, value >= least, at_least=least) for name, value, least in found]
    name, most = "p99 inter-token time beside a long prompt over quiet", MAX_LONG_PROMPT_RATIO
    return [*judged, _bar(name, ratio, ratio <= most, at_most=most)]


def table(numbers: dict[str, Any]) -> str:
    """Medians of every row, then the bars."""
    titles = ("clients", "case", "output/s", "total/s", "retention", "(roof)")
    latencies = ("TTFT p50/p99 ms", "inter-token p50/p99 ms")
    lines = ["{:>7} {:>10} {:>9} {:>9} {:>10} {:>7} {:>17} {:>23}".format(*titles, *latencies)]
    for r in numbers["rows"]:
        output, total, kept = (
            r[name]["median"]
            for name in ("output_tokens_per_second", "total_tokens_per_second", "retention")
        )
        lines.append(
            f"{r['concurrency']:>7} {r['case']:>10} {output:>9.1f} {total:>9.1f} {kept:>10.3f} "
            f"({r['retention_roof']:>5.2f}) {_millis(r, 'first_token'):>17} "
            f"{_millis(r, 'inter_token'):>23}"
        )
    for bar in numbers["bars"]:
        limit = f"at least {bar['at_least']}" if "at_least" in bar else f"at most {bar['at_most']}"
        verdict = "holds" if bar["holds"] else "MISSED"
        lines.append(f"{bar['bar']}: {bar['value']:.3f}, {limit}: {verdict}")
    return "\n".join(lines)


def _bar(name: str, value: float, holds: bool, **limit: float) -> dict[str, Any]:
    return {"bar": name, "value": value, **limit, "holds": holds}


def _millis(row: dict[str, Any], kind: str) -> str:
    p50, p99 = (1e3 * row[f"{kind}_{p}_seconds"]["median"] for p in ("p50", "p99"))
    return f"{p50:.0f}/{p99:.0f}"
