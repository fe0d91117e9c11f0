"""S-LoRA's table: requests per second as adapters grow in number, beside the base model alone.

Its traces, settings and machine; beside its rate, which may leave this server idle, twice that
rate, which does not. Two more rows ask what the answer owes to what is assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from bench.simulation.engine import Setup
from bench.simulation.experiment import Bar, Case, Experiment, measure, ratios
from bench.simulation.fleet import ATTENTION, LLAMA_7B, LLAMA_13B, Fleet
from bench.simulation.machine import MACHINES
from bench.workloads import SLORA_RANKS, Trace, adapter_ranks, slora

SETTINGS = {"S1": LLAMA_7B, "S2": LLAMA_7B, "S4": LLAMA_13B}
ADAPTERS = (5, 100, 1000, 2000)
NUM_REQUESTS = 1200
PUBLISHED_RATE, SATURATING_RATE = 10, 20  # requests a second
FIRST_SEED = 42  # of the published draw

LEAST_RETENTION, LEAST_OF_BASE = 0.95, 0.85

A100 = Setup(MACHINES["a100-80"])


def run(seeds: Sequence[int], *, num_requests: int = NUM_REQUESTS) -> Experiment:
    """Rows by setting, rate and number of adapters (0: the base model alone), and the bars."""
    cases = [
        case
        for setting in SETTINGS
        for rate in (PUBLISHED_RATE, SATURATING_RATE)
        for case in _cases(setting, rate, num_requests)
    ]
    rows = measure([*cases, *_assumptions(num_requests)], seeds)
    title = "S-LoRA's table: Poisson arrivals, uniform popularity, lengths 8 to 511"
    found = Experiment("slora", title, rows)
    return dataclasses.replace(found, bars=list(_bars(found)))


def trace(num_adapters: int, rate: float, num_requests: int, seed: int) -> Trace:
    """S-LoRA's; seed 0 is the published draw."""
    seconds = num_requests / rate
    return slora(num_adapters, 1, rate, 1, seconds, seed=FIRST_SEED + seed)


def _cases(setting: str, rate: int, num_requests: int) -> list[Case]:
    cases = []
    for n in (0, *ADAPTERS):
        offered = n or ADAPTERS[0]
        fleet = Fleet(SETTINGS[setting], adapter_ranks(offered, SLORA_RANKS[setting]), ATTENTION)
        labels = {"setting": setting, "rate": rate, "adapters": n, "variant": "q,k,v,o"}
        draw = partial(_base if n == 0 else trace, offered, rate, num_requests)
        cases.append(Case(labels, A100, fleet, draw))
    return cases


def _base(num_adapters: int, rate: float, num_requests: int, seed: int) -> Trace:
    return trace(num_adapters, rate, num_requests, seed).base_only()


def _assumptions(num_requests: int) -> list[Case]:
    """S2 at its largest, saturated: slower adapter kernels; adapters on all seven projections."""
    n, rate = ADAPTERS[-1], SATURATING_RATE
    machine = A100.machine
    slow = dataclasses.replace(machine.assumed, adapter_bandwidth=machine.assumed.bandwidth / 2)
    slow_setup = Setup(dataclasses.replace(machine, assumed=slow))
    ranks = adapter_ranks(n, SLORA_RANKS["S2"])
    labels = {"setting": "S2", "rate": rate, "adapters": n}
    draw = partial(trace, n, rate, num_requests)
    return [
        Case(
            {**labels, "variant": f"adapter kernels at {slow.adapter_bandwidth:.0%}"},
            slow_setup,
            Fleet(LLAMA_7B, ranks, ATTENTION),
            draw,
        ),
        Case({**labels, "variant": "all seven"}, A100, Fleet(LLAMA_7B, ranks), draw),
    ]


def _bars(found: Experiment) -> list[Bar]:
    bars = []
    for setting in SETTINGS:
        for rate in (PUBLISHED_RATE, SATURATING_RATE):
            base, few, many = (
                found.find(setting=setting, rate=rate, adapters=n, variant="q,k,v,o")
                for n in (0, ADAPTERS[0], ADAPTERS[-1])
            )
            which = f"{setting} at {rate} requests/s: {ADAPTERS[-1]} adapters over"
            kept, of_base = ratios(many, few), ratios(many, base)
            bars.append(Bar(f"{which} {ADAPTERS[0]}", kept, LEAST_RETENTION, is_least=True))
            bars.append(Bar(f"{which} base only", of_base, LEAST_OF_BASE, is_least=True))
    return bars
