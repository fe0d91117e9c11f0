"""Plays traces against one server over HTTP, and turns what came back into figures."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.http_client import HttpClient
from bench.random_adapters import write_adapter
from bench.replay import (
    Ask,
    Timeline,
    closed_loop,
    distinct_at_once,
    figures,
    open_loop,
    steady_rate,
)
from bench.workloads import BASE, RandomPrompts, Trace, adapter_ranks, named_trace
from server.engine.spec import EngineSpec

COUNTERS = {
    "loads_per_second": "manylora_adapter_loads_total",
    "evictions_per_second": "manylora_adapter_evictions_total",
    "preemptions_per_second": "manylora_preemptions_total",
    "steps_per_second": "manylora_steps_total",
}
"""Figures, and the server's counters that they are the growth of."""

REPORT_SECONDS = 0.3
"""After which the server's counters have taken in all that happened."""


class LoadTest:
    """Adapter i of a trace is self.names[i], whose rank and weights its name tells."""

    def __init__(self, client: HttpClient, spec: EngineSpec, options: argparse.Namespace) -> None:
        self._client = client
        self._spec = spec
        self._options = options
        self._prompts = RandomPrompts(spec.config.vocab_size)
        ranks = adapter_ranks(options.adapters, options.ranks, shuffle_seed=0)
        self._ranks = ranks
        self.names = [f"bench-{i}-r{rank}" for i, rank in enumerate(ranks)]

    async def prepare(self, directory: Path) -> dict[str, bool]:
        """Register the adapters that are not there yet, and see that they answer.

        Raises RuntimeError where an adapter's answer is the base model's.
        """
        known = await self._client.adapter_ids()
        for i, (name, rank) in enumerate(zip(self.names, self._ranks, strict=True)):
            if name not in known:
                written = write_adapter(directory / name, self._spec.layout, rank, i)
                await self._client.upload(name, written)
        (prompt,) = self._prompts.draw([32])
        answers = {
            name: await self._client.complete(prompt, name, 16) for name in [None, *self.names[:3]]
        }
        if len({text for _, text in answers.values()}) < len(answers):
            raise RuntimeError(f"two of {list(answers)} give one answer to one prompt: {answers}")
        return {"answers_differ": True}

    def traces(self, name: str, rate: float, seed: int) -> dict[str, Trace]:
        """A workload for the adapters; the same lengths at the same times for the base model."""
        trace = self._trace(name, rate, self._options.requests, seed)
        return {"adapters": trace, "base": trace.base_only()}

    async def saturation(self, name: str) -> dict[str, float]:
        """Completed requests a second when clients send as soon as they are answered."""
        num_requests = self._options.saturation_requests
        trace = self._trace(name, rate=1.0, num_requests=num_requests, seed=0)
        found = {}
        for served, requests in (("adapters", trace), ("base", trace.base_only())):
            ask = self._asking(requests)
            timelines = await closed_loop(num_requests, self._options.clients, ask)
            found[served] = steady_rate(timelines)
        return found

    async def play(self, trace: Trace) -> dict[str, float]:
        """The figures of one open-loop run."""
        before = await self._counters()
        timelines = await open_loop(trace.due_seconds, self._asking(trace))
        after = await self._counters()
        found = figures(timelines)
        at_once = distinct_at_once(timelines, trace.adapter.tolist())
        growth = {
            name: (after[counter] - before[counter]) / found["seconds"]
            for name, counter in COUNTERS.items()
        }
        return {
            **found,
            **service(timelines, self._options.slo_seconds),
            "distinct_requested": trace.num_distinct,
            "distinct_at_once": at_once["mean"],
            "most_distinct_at_once": at_once["most"],
            **growth,
        }

    def _trace(self, name: str, rate: float, num_requests: int, seed: int) -> Trace:
        options = self._options
        trace = named_trace(
            name,
            len(self.names),
            rate,
            num_requests,
            lengths=tuple(options.lengths),
            max_total=options.max_total,
            seed=seed,
        )
        return trace.with_base_share(options.base_share, seed)

    def _asking(self, trace: Trace) -> Ask:
        texts = self._prompts.draw(trace.num_prompt)
        adapters, num_output = trace.adapter.tolist(), trace.num_output.tolist()

        async def ask(i: int, arrived: Callable[[], None]) -> int:
            name = None if adapters[i] == BASE else self.names[adapters[i]]
            num_tokens, _ = await self._client.complete(texts[i], name, num_output[i], arrived)
            return num_tokens

        return ask

    async def _counters(self) -> dict[str, float]:
        await asyncio.sleep(REPORT_SECONDS)
        return await self._client.metrics()


def service(timelines: Sequence[Timeline], slo_seconds: float) -> dict[str, float]:
    """S-LoRA's two measures, over all requests; one that failed counts 0.

    attainment: share whose first token came within slo_seconds. satisfaction: mean of
    1 - (time to first token / slo_seconds)², floored at 0.
    """
    shares = [
        0.0 if t.error is not None else max(0.0, 1 - (t.first_token_seconds / slo_seconds) ** 2)
        for t in timelines
    ]
    return {
        "attainment": statistics.fmean(share > 0 for share in shares),
        "satisfaction": statistics.fmean(shares),
    }
