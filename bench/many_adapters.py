"""What if adapters far outnumber the device: thousands stored, memory for a few, beside all?

The engine runs in a process of its own, as in the server, without HTTP; two of them, with one set
of requests, sent open loop: one has memory for a few adapters (--fit) beside the KV cache, the
other for every adapter that the requests name, all loaded before. Offered is a share of the
saturation of the second one, which is measured first. Each run's first requests are warm-up.

1. Popularity: all stored adapters, uniform and Zipf.
2. Slot cliff: fewer and more active adapters than fit, at the same rate.
3. Cold start: the first request of an adapter on disk, in the page cache, in host memory and on
   the device, among decoding streams.

Before anything is timed, answers are held against dense fp32 arithmetic, and answers in a crowd of
more adapters than fit against the same requests alone.

workloads: slora-ALPHA (1 is uniform), zipf-EXPONENT
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.adapter_traffic import AdapterTraffic
from bench.cold_start import cold_settings, cold_starts
from bench.dense_check import check_against_dense
from bench.engine_session import engine_session
from bench.http_load import across_seeds
from bench.many_adapters_plan import Point, points, pools, saturation_traces, trace_of
from bench.many_adapters_table import COMPARED, bars, table
from bench.record import (
    add_model_flag,
    arguments,
    changed,
    engine_settings,
    finish,
    numbers,
    whole_numbers,
)
from bench.stored_images import store_fleet
from bench.workloads import adapter_ranks
from server.engine.spec import engine_spec

WORKLOADS = ("slora-1", "zipf-1")
RANK_MIX = (8,) * 10 + (16,) * 6 + (32,) * 3 + (64,)
"""Half of rank 8 and a twentieth of rank 64: 17 on average, which keeps a thousand on a disk."""

Results = dict[str, Any]


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    add_model_flag(parser)
    parser.add_argument("--adapters", type=int, default=1000, help="how many are stored")
    parser.add_argument("--ranks", type=whole_numbers, default=RANK_MIX, help="in turn, shuffled")
    parser.add_argument("--fit", type=int, default=16, help="adapters that the small pool holds")
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=WORKLOADS)
    parser.add_argument("--widths", type=numbers, default=(0.5, 1.0, 1.5, 2.0, 4.0), help="of fit")
    parser.add_argument("--lengths", type=whole_numbers, default=(8, 64), help="lowest, end")
    parser.add_argument("--load", type=float, default=0.8, help="of saturation")
    parser.add_argument("--clients", type=int, default=32, help="that find the saturation")
    parser.add_argument("--saturation-requests", type=int, default=160)
    parser.add_argument("--requests", type=int, default=150, help="of each point and seed")
    parser.add_argument("--warm-requests", type=int, default=50, help="before them, not counted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cold-ranks", type=whole_numbers, default=(16, 64))
    parser.add_argument("--cold-prompt", type=int, default=32)
    parser.add_argument("--streams", type=int, default=8, help="beside a cold start")
    parser.add_argument("--rounds", type=int, default=5, help="of cold starts")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> Results:
    """Measure everything; returns the record."""
    if options.quick:
        options.adapters, options.ranks, options.fit = 12, (4, 8), 3
        options.widths, options.lengths, options.clients = (1.0, 2.0), (2, 8), 4
        options.saturation_requests, options.requests, options.warm_requests = 10, 8, 4
        options.seeds, options.cold_ranks, options.cold_prompt = 1, (8,), 4
        options.streams, options.rounds = 2, 1
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_run(options, Path(directory)))


async def _run(options: argparse.Namespace, directory: Path) -> Results:
    spec = engine_spec(engine_settings(options, directory))
    ranks = adapter_ranks(options.adapters, options.ranks, shuffle_seed=0)
    fleet = store_fleet(spec, ranks, directory)
    few, all_fit = (
        engine_settings(options, directory, **sizes) for sizes in pools(options, spec, fleet)
    )
    async with engine_session(few) as first, engine_session(all_fit) as second:
        check = await check_against_dense(first, fleet.templates, directory)
        paged, resident = AdapterTraffic(first, fleet), AdapterTraffic(second, fleet)
        check |= await paged.check(2 * options.fit)
        found = await _measure(paged, resident, options)
        peaks = {"paged": first.peak_bytes(), "resident": second.peak_bytes()}
    cold = engine_settings(options, directory, **cold_settings(spec, fleet))
    async with engine_session(cold) as session:
        cold_rows = await cold_starts(session, fleet, options)
    results = {
        "model": spec.config.name,
        "dtype": spec.dtype,
        "settings": {"paged": changed(few), "resident": changed(all_fit), "cold": changed(cold)},
        "stored": {
            "num_adapters": len(ranks),
            "by_rank": {rank: ranks.count(rank) for rank in sorted(set(ranks))},
            "num_bytes": fleet.num_bytes,
            "mean_adapter_bytes": fleet.mean_pages * spec.page_bytes,
        },
        "peak_bytes": peaks,
        "check": check,
        **found,
        "cold_starts": cold_rows,
    }
    results["bars"] = bars(results, options.fit)
    print(table(results, options.fit))
    return finish("many_adapters", spec.device, options, results)


async def _measure(
    paged: AdapterTraffic, resident: AdapterTraffic, options: argparse.Namespace
) -> Results:
    """The saturation of each workload, then two rows of each point, over seeds.

    A seed plays every point on both engines, in turn, before the next seed does.
    """
    saturation = {}
    for name, trace in saturation_traces(options).items():
        await resident.have_resident(trace)
        saturation[name] = await resident.saturation(trace, options.clients)
        print(f"{name}: saturation {saturation[name]:.2f} requests/s", file=sys.stderr)
    plan = [(point, options.load * saturation[point.workload]) for point in points(options)]
    runs: dict[tuple[Point, str], list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for point, rate in plan:
            trace = trace_of(options, point, rate, seed)
            await resident.have_resident(trace)
            both = [("paged", paged), ("resident", resident)]
            for served, traffic in both if seed % 2 else reversed(both):
                found = await traffic.play(trace, options.warm_requests)
                runs.setdefault((point, served), []).append(found)
                told = ", ".join(f"{name} {found[name]:.3f}" for name in COMPARED)
                print(f"seed {seed}, {point}, {served}: {told}", file=sys.stderr)
    rows = []
    for point, rate in plan:
        alone = runs[point, "resident"]
        for served in ("resident", "paged"):
            row = {**dataclasses.asdict(point), "rate": rate, "served": served}
            ratios = [_ratios(*pair) for pair in zip(runs[point, served], alone, strict=True)]
            rows.append(
                row | across_seeds(runs[point, served]) | {"over_resident": across_seeds(ratios)}
            )
    return {"saturation": saturation, "rows": rows}


def _ratios(above: dict[str, float], below: dict[str, float]) -> dict[str, float]:
    return {name: above[name] / below[name] for name in COMPARED}


if __name__ == "__main__":
    main()
