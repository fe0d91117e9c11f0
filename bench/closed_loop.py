"""What do adapters cost? Tokens per second with 1 to 64 distinct ones, beside the base model alone.

The engine runs in a process of its own, as in the server, without HTTP. A fixed number of clients
each send their next request when the last one is answered: random prompts of one length, outputs
of one length, greedy, end of sequence ignored. The cases of a round follow one another, so that
noise hits all alike; retention is the median over rounds of a case's output tokens per second over
the base model's in the same round. Adapters are resident before a case begins.

Also: base traffic with idle adapters beside it over the same with none on the device; and what a
long prompt does to the tokens of streams that are decoding. Before anything is timed, answers are
held against dense fp32 arithmetic.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.closed_cases import Case, cases, one_batch, work_of
from bench.closed_loop_table import bars, table
from bench.dense_check import check_against_dense
from bench.engine_session import EngineSession, engine_session, store_adapters
from bench.long_prompt import long_prompt_effect
from bench.machine_limits import Limits, Work, measure_limits, roof_seconds
from bench.record import (
    add_model_flag,
    arguments,
    changed,
    engine_settings,
    finish,
    spread,
    whole_numbers,
)
from bench.workloads import adapter_ranks
from server.engine.request import AdapterImage
from server.engine.spec import engine_spec

FIGURES = (
    "output_tokens_per_second",
    "total_tokens_per_second",
    "first_token_p50_seconds",
    "first_token_p99_seconds",
    "inter_token_p50_seconds",
    "inter_token_p99_seconds",
)


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    add_model_flag(parser)
    parser.add_argument("--concurrency", type=whole_numbers, default=(1, 8, 32))
    parser.add_argument("--adapters", type=whole_numbers, default=(1, 8, 32, 64))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--mixed-ranks", type=whole_numbers, default=(8, 16, 32, 64))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--long-prompt", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the record."""
    if options.quick:
        options.concurrency, options.adapters, options.mixed_ranks = (1, 2), (1, 2), (4, 8)
        options.rank, options.prompt, options.tokens, options.rounds = 8, 8, 4, 1
        options.streams, options.long_prompt = 2, 64
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_run(options, Path(directory)))


async def _run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    num_adapters = max(options.adapters)
    settings = engine_settings(
        options,
        directory,
        max_num_seqs=max(*options.concurrency, options.streams + 1),
        max_adapters=num_adapters,
    )
    spec = engine_spec(settings)
    limits = measure_limits(spec.device, spec.torch_dtype)
    plain = (options.rank,) * num_adapters
    mixed = tuple(adapter_ranks(num_adapters, options.mixed_ranks))
    images = store_adapters(spec, plain + mixed, directory)
    async with engine_session(settings) as session:
        checked = await check_against_dense(session, images, directory)
        plans = {
            concurrency: cases(
                options, concurrency, images[:num_adapters], images[num_adapters:], mixed
            )
            for concurrency in options.concurrency
        }
        rows = await measure(session, plans, options, limits)
        idle = await idle_adapters(session, images[:num_adapters], options)
        disturbed = await long_prompt_effect(
            session,
            num_streams=options.streams,
            num_prompt=options.prompt,
            long_prompt=options.long_prompt,
            rounds=options.rounds,
        )
        numbers = {
            "model": spec.config.name,
            "dtype": spec.dtype,
            "settings": changed(settings),
            "engine_start_seconds": session.start_seconds,
            "check": checked,
            "limits": limits.as_dict(),
            "rows": rows,
            "idle_adapters": idle,
            "long_prompt": disturbed,
            "peak_bytes": session.peak_bytes(),
            "device_bytes": session.device_bytes(),
        }
    numbers["bars"] = bars(numbers)
    print(table(numbers))
    return finish("closed_loop", spec.device, options, numbers)


async def measure(
    session: EngineSession,
    plans: dict[int, list[Case]],
    options: argparse.Namespace,
    limits: Limits,
) -> list[dict[str, Any]]:
    """A row for each number of clients and case, over rounds; the first round warms up."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for number in range(-1, options.rounds):
        for concurrency, plan in plans.items():
            first = number % len(plan)
            for case in [*plan[first:], *plan[:first]]:
                await session.make_resident(case.images)
                numbers = await one_batch(session, case, concurrency, options)
                if number >= 0:
                    found.setdefault((concurrency, case.name), []).append(numbers)
    return [
        row(session, case, found[concurrency, case.name], found[concurrency, "base"], work, limits)
        for concurrency, plan in plans.items()
        for case in plan
        for work in [work_of(case, concurrency, options)]
    ]


def row(
    session: EngineSession,
    case: Case,
    rounds: Sequence[dict[str, float]],
    base: Sequence[dict[str, float]],
    work: Work,
    limits: Limits,
) -> dict[str, Any]:
    """A case's figures, what it keeps of the base's rate, and the roofs of both."""
    config, itemsize = session.spec.config, session.spec.torch_dtype.itemsize
    roof = roof_seconds(limits, config, itemsize, work)
    base_roof = roof_seconds(
        limits, config, itemsize, dataclasses.replace(work, num_adapters=0, mean_rank=0.0)
    )
    rates = [numbers["output_tokens_per_second"] for numbers in rounds]
    roof_rate = work.num_requests * work.num_output / roof
    return {
        "case": case.name,
        "concurrency": work.concurrency,
        "num_adapters": work.num_adapters,
        "ranks": sorted(set(case.ranks)),
        "num_requests": work.num_requests,
        **{name: spread([numbers[name] for numbers in rounds]) for name in FIGURES},
        "retention": spread(
            [a / b["output_tokens_per_second"] for a, b in zip(rates, base, strict=True)]
        ),
        "retention_roof": base_roof / roof,
        "roof_tokens_per_second": roof_rate,
        "share_of_roof": statistics.median(rates) / roof_rate,
    }


async def idle_adapters(
    session: EngineSession, images: Sequence[AdapterImage], options: argparse.Namespace
) -> dict[str, Any]:
    """Base traffic with every adapter resident and unused, over the same with none resident."""
    base, concurrency = Case("base", (), ()), max(options.concurrency)
    rates: dict[str, list[float]] = {"none": [], "idle": []}
    for number in range(options.rounds):
        for state in ("none", "idle") if number % 2 else ("idle", "none"):
            if state == "idle":
                await session.make_resident(images)
            else:
                await session.drop_all(images)
            numbers = await one_batch(session, base, concurrency, options)
            rates[state].append(numbers["output_tokens_per_second"])
    ratios = [idle / none for idle, none in zip(rates["idle"], rates["none"], strict=True)]
    return {"concurrency": concurrency, "num_adapters": len(images), "ratio": spread(ratios)}


if __name__ == "__main__":
    main()
