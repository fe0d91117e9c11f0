"""How long does the scheduler itself take, plan and commit, as running and waiting requests grow?

The server's scheduler and memory in plain Python, with every sequence decoding or being admitted,
a queue that is kept at its length, adapters beyond the slots, and steps that compute nothing.
CPU time of this process: what else the machine does is not in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import finish, percentiles, whole_numbers
from bench.simulation.engine import Setup, SimulatedEngine, submission
from bench.simulation.fleet import ATTENTION, LLAMA_7B, Fleet
from bench.simulation.machine import MACHINES
from bench.simulation.transfers import VirtualClock
from bench.workloads import SLORA_RANKS, adapter_ranks
from server.engine.request import FromEngine, ToEngine

LENGTHS = (8, 512)  # of prompts and outputs, uniform, the second left out
POOL_SHARE = 4.0  # of an A100's pool: 512 sequences and every slot's adapter fit
NUM_SLOTS = 1024
P50_SECONDS, P99_SECONDS = 1.5e-3, 4e-3
BAR_AT = (256, 2000)  # running, waiting
MOST_QUEUE_GROWTH = 1.25  # of the p50, from the shortest queue to the longest


def main() -> None:
    """Measure every pair of sizes."""
    options = _parser().parse_args()
    if options.quick:
        options.running, options.waiting, options.steps, options.adapters = (4,), (8, 16), 20, 32
    rows = [
        measure(running, waiting, options.adapters, options.steps)
        for running in options.running
        for waiting in options.waiting
    ]
    verdicts = bars(rows)
    print(table(rows, verdicts))
    results = {"unit": "CPU seconds", "rows": rows, "bars": verdicts}
    finish("scheduler_time", "cpu", options, results)


class Load:
    """An engine that is kept at a number of running and of waiting requests."""

    def __init__(
        self, num_running: int, num_waiting: int, num_adapters: int, seed: int = 0
    ) -> None:
        ranks = adapter_ranks(num_adapters, SLORA_RANKS["S2"], shuffle_seed=seed)
        self._fleet = Fleet(LLAMA_7B, ranks, ATTENTION)
        self._generator = np.random.default_rng(seed)
        self._clock = VirtualClock()
        self._setup = Setup(
            MACHINES["a100-80"],
            pool_share=POOL_SHARE,
            max_num_seqs=num_running,
            max_batched_tokens=2048,
            max_adapters=min(NUM_SLOTS, num_adapters),
        )
        self.engine = SimulatedEngine(self._setup, self._fleet, self._clock, _NoPost())
        self._num_open = num_running + num_waiting
        self._num_submitted = 0
        self._make_resident()
        while self.engine.scheduler.num_running < num_running:
            self.step()
        # Streams that began together would end together.
        for _ in range(LENGTHS[1]):
            self.step()

    def step(self) -> tuple[float, float]:
        """CPU seconds of plan and of commit in one step; loads end, and the queue is refilled."""
        engine, scheduler = self.engine, self.engine.scheduler
        self._refill()
        engine.loader.deliver()
        began = time.process_time()
        plan = scheduler.plan()
        planned = time.process_time()
        assert plan is not None, "nothing to compute beside a queue"
        sampled = engine.runner.run(plan)
        computed = time.process_time()
        scheduler.commit(plan, sampled)
        committed = time.process_time()
        scheduler.take_events()
        return planned - began, committed - computed

    def _refill(self) -> None:
        scheduler = self.engine.scheduler
        while scheduler.num_running + scheduler.num_waiting < self._num_open:
            image = self._fleet.image(int(self._generator.integers(len(self._fleet))))
            lengths = self._generator.integers(*LENGTHS, 2).tolist()
            request = submission(self._setup, image, self._num_submitted, *lengths)
            scheduler.submit(request)
            self._num_submitted += 1

    def _make_resident(self) -> None:
        """Fill the slots, as in a server that has run for a while."""
        adapters = self.engine.adapters
        for i in range(adapters.num_slots):
            image = self._fleet.image(i)
            assert image is not None
            adapters.request(image)
        self._clock.advance(3600.0)
        self.engine.loader.deliver()
        adapters.poll()


class _NoPost:
    """A loop's post that is never used: the scheduler is driven by hand."""

    def receive(self, wait: bool) -> list[ToEngine]:
        raise AssertionError(f"receive({wait}) of a loop that does not turn")

    def send(self, messages: Sequence[FromEngine]) -> None:
        raise AssertionError(f"{len(messages)} messages of a loop that does not turn")


def measure(
    num_running: int, num_waiting: int, num_adapters: int, num_steps: int
) -> dict[str, Any]:
    """One row: percentiles over steps, of plan, of commit and of both."""
    load = Load(num_running, num_waiting, num_adapters)
    parts = np.array([load.step() for _ in range(num_steps)])
    load.engine.check()
    return {
        "num_running": num_running,
        "num_waiting": num_waiting,
        "num_adapters": num_adapters,
        "plan_seconds": percentiles(parts[:, 0].tolist(), 50, 99),
        "commit_seconds": percentiles(parts[:, 1].tolist(), 50, 99),
        "seconds": percentiles(parts.sum(axis=1).tolist(), 50, 99),
    }


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stated bars that these rows decide: value, limit, verdict."""
    p50 = {(r["num_running"], r["num_waiting"]): r["seconds"]["p50"] for r in rows}
    p99 = {(r["num_running"], r["num_waiting"]): r["seconds"]["p99"] for r in rows}
    running, waiting = sorted({n for n, _ in p50}), sorted({n for _, n in p50})
    found = []
    if BAR_AT in p50:
        where = "{} running, {} waiting".format(*BAR_AT)
        found += [(f"p50 seconds, {where}", p50[BAR_AT], P50_SECONDS)]
        found += [(f"p99 seconds, {where}", p99[BAR_AT], P99_SECONDS)]
    fewest, most = running[0], running[-1]
    if fewest < most:
        growth = max(p50[most, n] / p50[fewest, n] for n in waiting)
        found += [(f"p50 from {fewest} to {most} running", growth, most / fewest)]
    if waiting[0] < waiting[-1]:
        growth = max(p50[n, waiting[-1]] / p50[n, waiting[0]] for n in running)
        name = f"p50 from {waiting[0]} to {waiting[-1]} waiting"
        found += [(name, growth, MOST_QUEUE_GROWTH)]
    return [
        {"bar": name, "value": value, "at_most": limit, "holds": value <= limit}
        for name, value, limit in found
    ]


def table(rows: Sequence[dict[str, Any]], verdicts: Sequence[dict[str, Any]]) -> str:
    """For people, in milliseconds of CPU time."""
    lines = ["running  waiting  adapters  plan p50/p99  commit p50/p99  both p50/p99 ms"]
    for row in rows:
        plan, commit, both = (
            "{:.2f}/{:.2f}".format(*(1e3 * x for x in row[name].values()))
            for name in ("plan_seconds", "commit_seconds", "seconds")
        )
        lines.append(
            f"{row['num_running']:>7}  {row['num_waiting']:>7}  {row['num_adapters']:>8}  "
            f"{plan:>12}  {commit:>14}  {both:>12}"
        )
    for bar in verdicts:
        verdict = "holds" if bar["holds"] else "MISSED"
        lines.append(f"{bar['bar']}: {bar['value']:.4g}, at most {bar['at_most']:g}: {verdict}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--running", type=whole_numbers, default=(64, 128, 256, 512))
    add("--waiting", type=whole_numbers, default=(100, 1000, 2000, 10000))
    add("--adapters", type=int, default=5000, help="that requests name (%(default)s)")
    add("--steps", type=int, default=500, help="measured, of each size (%(default)s)")
    add("--output", type=Path, help="also write the JSON line to this file")
    add("--quick", action="store_true", help="smallest sizes: shows that it runs, measures nothing")
    return parser


if __name__ == "__main__":
    main()
