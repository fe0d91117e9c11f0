"""How does the server hold up under traffic for many adapters, over HTTP, as load grows?

Plays S-LoRA's workload, Punica's mixes and Zipf popularities against a real server process, open
loop: requests are sent when they are due, whatever is unanswered, and latency counts from then.
Each workload's saturation is found first, by clients that send as soon as they are answered; then
shares of it are offered. Beside every row, requests of the same lengths at the same times for the
base model. Every answer must name the adapter that was asked for.

workloads: slora-ALPHA (1 is uniform), punica-distinct, -uniform, -skewed, -identical, zipf-EXPONENT
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.http_client import HttpClient
from bench.load_test import LoadTest
from bench.record import (
    add_model_flag,
    arguments,
    changed,
    engine_settings,
    finish,
    numbers,
    whole_numbers,
)
from bench.server_process import server_process
from server.engine.spec import engine_spec

WORKLOADS = (
    "slora-1",
    "punica-distinct",
    "punica-uniform",
    "punica-skewed",
    "punica-identical",
    "zipf-1",
    "zipf-1.5",
)


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    add_model_flag(parser)
    parser.add_argument("--url", help="a server that runs already, of the same --model")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=WORKLOADS)
    parser.add_argument("--adapters", type=int, default=32, help="how many are registered")
    parser.add_argument("--ranks", type=whole_numbers, default=(16,), help="in turn, shuffled")
    parser.add_argument("--lengths", type=whole_numbers, default=(8, 64), help="lowest, end")
    parser.add_argument("--max-total", type=int, default=128, help="Punica's prompt + output")
    parser.add_argument("--base-share", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=100, help="of each point and seed")
    parser.add_argument("--loads", type=numbers, default=(0.5, 0.8, 1.0), help="of saturation")
    parser.add_argument("--rate", type=numbers, help="requests a second, in place of --loads")
    parser.add_argument("--clients", type=int, default=64, help="that find the saturation")
    parser.add_argument("--saturation-requests", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slo-seconds", type=float, default=6.0, help="for the first token")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the record."""
    if options.quick:
        options.workloads, options.adapters = ("slora-1", "punica-skewed"), 3
        options.ranks, options.lengths, options.max_total = (4, 8), (2, 6), 10
        options.requests, options.loads, options.seeds = 6, (0.5, 1.0), 1
        options.clients, options.saturation_requests = 4, 10
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        settings = engine_settings(options, directory, max_num_seqs=options.clients)
        spec = engine_spec(settings)
        server = None
        if options.url is None:
            server = stack.enter_context(server_process(settings, directory / "server.log"))
        client = HttpClient(server.url if server else options.url)
        test = LoadTest(client, spec, options)
        found = asyncio.run(_measure(test, options, directory))
        results = {
            "model": spec.config.name,
            "dtype": spec.dtype,
            "settings": changed(settings),
            "start_seconds": server.start_seconds if server else None,
            "peak_bytes": server.peak_bytes() if server else None,
            **found,
        }
    print(table(results["rows"]))
    return finish("http_load", spec.device, options, results)


async def _measure(test: LoadTest, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Saturation of every workload, then its rows: all seeds of a point, adapters and base in turn.

    A seed plays every point once before the next seed does.
    """
    check = await test.prepare(directory)
    saturation = {}
    if options.rate is None:
        saturation = {name: await test.saturation(name) for name in options.workloads}
    points = [
        (name, load, rate)
        for name in options.workloads
        for load, rate in _offered(options, saturation.get(name))
    ]
    found: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for name, _, rate in points:
            for served, trace in test.traces(name, rate, seed).items():
                found.setdefault((name, rate, served), []).append(await test.play(trace))
    rows = [
        {
            "workload": name,
            "load": load,
            "rate": rate,
            "served": served,
            **across_seeds(found[name, rate, served]),
        }
        for name, load, rate in points
        for served in ("adapters", "base")
    ]
    return {"check": check, "saturation": saturation, "rows": rows}


def _offered(
    options: argparse.Namespace, saturation: dict[str, float] | None
) -> list[tuple[float | None, float]]:
    """(share of the adapters' saturation, requests a second) of each point of a workload."""
    if saturation is None:
        return [(None, rate) for rate in options.rate]
    return [(load, load * saturation["adapters"]) for load in options.loads]


def across_seeds(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each figure over the seeds."""
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name in runs[0]
        for values in [[numbers[name] for numbers in runs]]
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians, for people."""
    lines = [
        "        workload  load   rate   served  done/s  TTFT p50/p99 s  ITL p50/p99 ms"
        "  attained  satisfied  distinct  at once  loads/s"
    ]
    for row in rows:
        load = "-" if row["load"] is None else f"{row['load']:g}"
        value = {name: cell["median"] for name, cell in row.items() if isinstance(cell, dict)}
        first = f"{value['first_token_p50_seconds']:.2f}/{value['first_token_p99_seconds']:.2f}"
        p50, p99 = (1e3 * value[f"inter_token_{p}_seconds"] for p in ("p50", "p99"))
        lines.append(
            f"{row['workload']:>16} {load:>5} {row['rate']:>6.2f} {row['served']:>8} "
            f"{value['completed_per_second']:>7.2f} {first:>15} {f'{p50:.0f}/{p99:.0f}':>15} "
            f"{value['attainment']:>9.2f} {value['satisfaction']:>10.2f} "
            f"{value['distinct_requested']:>9.0f} {value['distinct_at_once']:>8.1f} "
            f"{value['loads_per_second']:>8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
