"""A tenant that asks for eight times its share, and seven that ask for half of theirs.

Who waits, in the order of arrival and in that of the virtual counters; and how far the service of
tenants that all have more than enough to do drifts apart.  (VTC, arXiv:2401.00588, theorem 4.4)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from bench.record import percentiles
from bench.simulation.engine import Setup
from bench.simulation.experiment import (
    SLO_SECONDS,
    Bar,
    Case,
    Experiment,
    measure,
    ratios,
    saturation,
)
from bench.simulation.fleet import ATTENTION, LLAMA_7B, Fleet
from bench.simulation.machine import MACHINES
from bench.simulation.replay import Run
from bench.simulation.service import gap_bound, largest_gap
from bench.simulation.slora_table import SATURATING_RATE
from bench.workloads import Trace, adapter_ranks

NUM_TENANTS, RANK = 8, 16
HEAVY = 0
HEAVY_SHARE, LIGHT_SHARE = 8.0, 0.5  # of an eighth of saturation
LENGTHS = (8, 512)
NUM_REQUESTS = 3000  # of the heavy mix: some minutes of it
DEADLINE_SECONDS = 6.0
MOST_LIGHT_GROWTH = 1.5

A100 = Setup(MACHINES["a100-80"])
MIXES = {
    "light alone": (0.0, *(LIGHT_SHARE,) * (NUM_TENANTS - 1)),
    "one heavy": (HEAVY_SHARE, *(LIGHT_SHARE,) * (NUM_TENANTS - 1)),
    "all backlogged": (2.0,) * NUM_TENANTS,
}
ORDERS = {
    "arrival": dataclasses.replace(A100, is_fair=False),
    "VTC": A100,
    "arrival, deadline": dataclasses.replace(A100, is_fair=False, queue_timeout=DEADLINE_SECONDS),
    "VTC, deadline": dataclasses.replace(A100, queue_timeout=DEADLINE_SECONDS),
}
ROWS = (
    ("light alone", "VTC"),
    *(("one heavy", order) for order in ORDERS),
    ("all backlogged", "arrival"),
    ("all backlogged", "VTC"),
)


def run(seeds: Sequence[int], *, num_requests: int = NUM_REQUESTS) -> Experiment:
    """Rows by mix and order; bars on the light tenants' wait and on the largest gap."""
    fleet = Fleet(LLAMA_7B, adapter_ranks(NUM_TENANTS, (RANK,)), ATTENTION)
    even = (SATURATING_RATE / NUM_TENANTS,) * NUM_TENANTS
    full = Case({}, A100, fleet, partial(_trace, even, num_requests // 3))
    share = saturation(full, seeds) / NUM_TENANTS
    cases = []
    for mix, order in ROWS:
        rates = tuple(share * shares for shares in MIXES[mix])
        # As long as the heavy mix; a third of it where queues are there from the start.
        seconds = num_requests / (share * sum(MIXES["one heavy"]))
        size = round(sum(rates) * seconds / (3 if mix == "all backlogged" else 1))
        labels = {"traffic": mix, "order": order, "rate": round(sum(rates), 2)}
        cases.append(Case(labels, ORDERS[order], fleet, partial(_trace, rates, size)))
    num_kv_tokens = A100.num_pages(fleet) * fleet.shape.page_geometry().block_size
    rows = measure(cases, seeds, partial(_by_tenant, num_kv_tokens))
    title = (
        f"Fairness: {NUM_TENANTS} tenants, one share is an eighth of saturation, deadlines "
        f"{DEADLINE_SECONDS:g} s"
    )
    found = Experiment("fairness", title, rows)
    return dataclasses.replace(found, bars=_bars(found))


def _trace(rates: Sequence[float], num_requests: int, seed: int) -> Trace:
    """Poisson arrivals of every tenant at its rate, lengths uniform."""
    generator = np.random.default_rng(seed)
    shares = np.array(rates) / sum(rates)
    adapter = generator.choice(len(rates), num_requests, p=shares)
    num_prompt, num_output = generator.integers(*LENGTHS, (2, num_requests))
    return Trace(np.zeros(num_requests), adapter, num_prompt, num_output).arriving(sum(rates), seed)


def _by_tenant(num_kv_tokens: int, run: Run) -> dict[str, float]:
    """Waits of the light tenants and of the heavy one, attainment of the light; the largest gap."""
    is_heavy = run.trace.adapter == HEAVY
    light, heavy = (
        [t.first_token_seconds for t, is_one in zip(run.timelines, mask, strict=True)
         if is_one and t.pieces]
        for mask in (~is_heavy, is_heavy)
    )  # fmt: skip
    waits = {"light": percentiles(light, 50, 99), "heavy": percentiles(heavy, 50, 99)}
    in_time = sum(seconds < SLO_SECONDS for seconds in light)
    return {
        **{f"{who}_{p}_seconds": x for who, found in waits.items() for p, x in found.items()},
        "light_attainment": in_time / max(1, int((~is_heavy).sum())),
        "service_gap": largest_gap(run),
        "gap_bound": gap_bound(int(run.trace.num_prompt.max()), num_kv_tokens),
    }


def _bars(found: Experiment) -> list[Bar]:
    alone = found.find(traffic="light alone", order="VTC")
    beside = found.find(traffic="one heavy", order="VTC")
    growth = ratios(beside, alone, "light_p99_seconds")
    backlogged = found.find(traffic="all backlogged", order="VTC")
    gaps, bounds = backlogged.values("service_gap"), backlogged.values("gap_bound")
    used = [gap / bound for gap, bound in zip(gaps, bounds, strict=True)]
    return [
        Bar(
            "light tenants' p99 TTFT, beside a heavy one over alone",
            growth,
            MOST_LIGHT_GROWTH,
            False,
        ),
        Bar("largest service gap under VTC over its bound", used, 1.0, False),
    ]
