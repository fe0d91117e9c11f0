"""What happens when more adapters are asked for than have slots: a slope, or a cliff.

The load is the same at every width: 0.8 of what the server completes with all adapters resident.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from bench.simulation.engine import Setup
from bench.simulation.experiment import Bar, Case, Experiment, measure, ratios, saturation
from bench.simulation.fleet import ATTENTION, LLAMA_7B, Fleet
from bench.simulation.machine import MACHINES
from bench.simulation.slora_table import NUM_REQUESTS, SATURATING_RATE, trace
from bench.workloads import SLORA_RANKS, adapter_ranks

NUM_SLOTS = 64
WIDTHS = (0.5, 1.0, 1.5, 2.0, 4.0)  # active adapters over slots
LOAD = 0.8  # of saturation
MOST_GROWTH = 3.0  # of p99 time to first token at twice the slots

SETUP = Setup(MACHINES["a100-80"], max_adapters=NUM_SLOTS)


def run(seeds: Sequence[int], *, num_requests: int = NUM_REQUESTS) -> Experiment:
    """Rows by adapters over slots, S2's ranks, and the bar at twice the slots."""
    full = _case(1.0, SATURATING_RATE, num_requests)
    rate = LOAD * saturation(full, seeds)
    rows = measure([_case(width, rate, num_requests) for width in WIDTHS], seeds)
    title = (
        f"Slot cliff: {NUM_SLOTS} slots, S2's ranks, {LOAD:g} of the saturation with all resident"
    )
    found = Experiment("slot_cliff", title, rows)
    growth = ratios(found.find(width=2.0), found.find(width=1.0), "first_token_p99_seconds")
    bar = Bar("p99 TTFT, twice the slots over all resident", growth, MOST_GROWTH, False)
    return dataclasses.replace(found, bars=[bar])


def _case(width: float, rate: float, num_requests: int) -> Case:
    n = round(width * NUM_SLOTS)
    fleet = Fleet(LLAMA_7B, adapter_ranks(n, SLORA_RANKS["S2"]), ATTENTION)
    labels = {"width": width, "adapters": n, "rate": round(rate, 2)}
    return Case(labels, SETUP, fleet, partial(trace, n, rate, num_requests))
