"""Skewed traffic, some of it for the base model alone, on three machines at 0.8 of saturation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bench.simulation.engine import Setup
from bench.simulation.experiment import Case, Experiment, measure, saturation
from bench.simulation.fleet import Fleet
from bench.simulation.machine import MACHINES
from bench.workloads import Trace, adapter_ranks, zipf
from server.roofline.shapes import find_shape

NUM_ADAPTERS, RANKS = 1000, (8, 16, 32, 64)
NUM_REQUESTS = 800
LOAD = 0.8
SATURATING = {"a10g": 12.0, "a100-80": 40.0, "h100": 80.0}  # requests a second, beyond each
CASES = ((1.0, 0.0), (1.0, 0.2), (1.0, 0.5), (1.5, 0.0))  # Zipf's exponent, share of base requests


def run(seeds: Sequence[int], *, num_requests: int = NUM_REQUESTS) -> Experiment:
    """Rows by machine, exponent and base share: Llama-3-8B, adapters on all seven projections."""
    shape = find_shape("Llama-3-8B")
    fleet = Fleet(shape, adapter_ranks(NUM_ADAPTERS, RANKS, shuffle_seed=0))
    rows = []
    for machine in MACHINES:
        case = partial(_case, machine, fleet, num_requests)
        rate = LOAD * saturation(case(1.0, 0.0, SATURATING[machine]), seeds)
        rows += measure([case(*shares, rate) for shares in CASES], seeds)
    title = (
        f"Zipf traffic for {NUM_ADAPTERS} adapters of Llama-3-8B, {LOAD:g} of the saturation at "
        "exponent 1"
    )
    return Experiment("popularity", title, rows)


def _case(
    machine: str, fleet: Fleet, num_requests: int, exponent: float, base_share: float, rate: float
) -> Case:
    labels = {"machine": machine, "exponent": exponent, "base_share": base_share}
    draw = partial(_trace, exponent, base_share, rate, num_requests)
    return Case({**labels, "rate": round(rate, 2)}, Setup(MACHINES[machine]), fleet, draw)


def _trace(exponent: float, share: float, rate: float, num_requests: int, seed: int) -> Trace:
    drawn = zipf(NUM_ADAPTERS, exponent, num_requests, seed=seed)
    return drawn.arriving(rate, seed).with_base_share(share, seed)
