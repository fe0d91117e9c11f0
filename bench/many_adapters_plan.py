"""What the bench of many adapters plays: its points and their traces, and pools that fit them."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.stored_images import Fleet
from bench.workloads import Trace, named_trace
from server.engine.spec import EngineSpec

CLIFF_WORKLOAD = "slora-1"  # uniform; the same lengths and times whatever the number of adapters


@dataclass(frozen=True, slots=True)
class Point:
    """A load that is offered to both engines."""

    part: Literal["popularity", "cliff"]
    workload: str
    num_adapters: int  # that requests are drawn from: the first so many


def points(options: argparse.Namespace) -> list[Point]:
    """Every workload with all stored adapters, then the widths of the slot cliff."""
    active = [round(width * options.fit) for width in options.widths]
    return [
        *(Point("popularity", name, options.adapters) for name in options.workloads),
        *(Point("cliff", CLIFF_WORKLOAD, n) for n in active),
    ]


def trace_of(options: argparse.Namespace, point: Point, rate: float, seed: int) -> Trace:
    """A point's requests, those of its warm-up first."""
    num_requests = options.warm_requests + options.requests
    return _trace(options, point.workload, point.num_adapters, rate, num_requests, seed)


def saturation_traces(options: argparse.Namespace) -> dict[str, Trace]:
    """For each workload requests that no seed has; when they are due does not matter."""
    return {
        name: _trace(
            options, name, options.adapters, 1.0, options.saturation_requests, options.seeds
        )
        for name in dict.fromkeys([*options.workloads, CLIFF_WORKLOAD])
    }


def pools(
    options: argparse.Namespace, spec: EngineSpec, fleet: Fleet
) -> tuple[dict[str, int], dict[str, int]]:
    """The settings of an engine with memory for a few adapters, and of one with memory for all.

    Few: options.fit adapters of mean size, beside the KV cache of as many of the longest requests
    as there are clients. All: every adapter of any one trace beside the KV cache of all its
    requests, so that nothing is ever evicted. Slots and sequences are alike: memory is the limit.
    """
    block_size = spec.geometry.block_size
    traces = [
        *saturation_traces(options).values(),
        *(
            trace_of(options, point, 1.0, seed)
            for point in points(options)
            for seed in range(options.seeds)
        ),
    ]
    longest = 2 * (options.lengths[1] - 1)
    kv_pages = options.clients * math.ceil(longest / block_size)
    few_pages = math.ceil(options.fit * fleet.mean_pages) + kv_pages
    all_pages = kv_pages + max(_num_pages(trace, fleet, block_size) for trace in traces)
    both = {
        "max_num_seqs": options.clients,
        "max_adapters": max(options.fit, *(trace.num_distinct for trace in traces)),
        "max_adapter_rank": max(options.ranks),
    }
    few, all_fit = (pages * spec.page_bytes for pages in (few_pages, all_pages))
    return {**both, "pool_bytes": few}, {**both, "pool_bytes": all_fit}


def _num_pages(trace: Trace, fleet: Fleet, block_size: int) -> int:
    """Pages of a trace's adapters, and of the KV cache of all its requests."""
    adapters: int = sum(fleet.stored[i].num_pages for i in np.unique(trace.adapter).tolist())
    blocks = np.ceil((trace.num_prompt + trace.num_output) / block_size)
    return adapters + int(blocks.sum())


def _trace(
    options: argparse.Namespace,
    workload: str,
    num_adapters: int,
    rate: float,
    num_requests: int,
    seed: int,
) -> Trace:
    return named_trace(
        workload,
        num_adapters,
        rate,
        num_requests,
        lengths=tuple(options.lengths),
        max_total=2 * options.lengths[1],
        seed=seed,
    )
