"""One pool for KV cache and adapters against a border between them, as memory gets tight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from bench.simulation.engine import Setup
from bench.simulation.experiment import Bar, Case, Experiment, measure, ratios
from bench.simulation.fleet import ATTENTION, LLAMA_7B, Fleet
from bench.simulation.machine import MACHINES
from bench.simulation.slora_table import NUM_REQUESTS, SATURATING_RATE, trace
from bench.workloads import SLORA_RANKS, adapter_ranks

POOLS = (1.0, 0.6, 0.3)  # of the pool that the machine has room for
ADAPTERS = (5, 200, 1000)
SPLITS = (0.25, 0.5)  # of the pool, for adapters
LEAST_GAIN = 1.15  # at 0.6 of the pool and 200 adapters


def run(seeds: Sequence[int], *, num_requests: int = NUM_REQUESTS) -> Experiment:
    """Rows by pool, number of adapters and split (0: unified), saturated, S2's ranks; the bars."""
    cases = [
        _case(pool, n, split, num_requests)
        for pool in POOLS
        for n in ADAPTERS
        for split in (0.0, *SPLITS)
    ]
    title = f"Unified pool against fixed splits: S2's ranks, {SATURATING_RATE} requests/s offered"
    found = Experiment("memory", title, measure(cases, seeds))
    return dataclasses.replace(found, bars=_bars(found))


def _case(pool: float, n: int, split: float, num_requests: int) -> Case:
    fleet = Fleet(LLAMA_7B, adapter_ranks(n, SLORA_RANKS["S2"]), ATTENTION)
    setup = Setup(MACHINES["a100-80"], pool_share=pool, adapter_share=split or None)
    labels = {"pool": pool, "adapters": n, "split": split}
    return Case(labels, setup, fleet, partial(trace, n, SATURATING_RATE, num_requests))


def _bars(found: Experiment) -> list[Bar]:
    def gains(pool: float, n: int, split: float) -> list[float]:
        unified = found.find(pool=pool, adapters=n, split=0.0)
        return ratios(unified, found.find(pool=pool, adapters=n, split=split))

    bars = [
        Bar(
            f"unified over a split of {split:.0%}, 200 adapters, pool at 60 %",
            gains(0.6, 200, split),
            LEAST_GAIN,
            True,
        )
        for split in SPLITS
    ]
    sweep = [gains(pool, n, split) for pool in POOLS for n in ADAPTERS for split in SPLITS]
    worst = [min(by_seed) for by_seed in zip(*sweep, strict=True)]
    return [*bars, Bar("unified over any split, worst of the sweep", worst, 1.0, True)]
