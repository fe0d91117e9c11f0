"""Runs a planned step on the device: batch, forward, sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.engine import batch
from server.engine.sampler import Draw, sample

if TYPE_CHECKING:
    from server.engine.graphs import DecodeGraphs
    from server.engine.scheduler import SampledToken, StepPlan
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache
    from server.memory.page_pool import PagePool
    from server.model.decoder import Decoder


class Runner:
    """The model with the memory that it reads and writes; decides nothing."""

    def __init__(
        self,
        decoder: Decoder,
        pool: PagePool,
        kv_cache: KVCache,
        adapters: AdapterPool,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`graphs` compute the steps that they were captured for; without them none is."""
        self._decoder = decoder
        self._storage = pool.storage
        self._kv_cache = kv_cache
        self._adapters = adapters
        self._graphs = graphs

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Compute the plan's tokens; one sampled token for each item that samples, in order."""
        logits = None if self._graphs is None else self._graphs.run(plan)
        if logits is None:
            step = batch.build(plan, self._kv_cache, self._adapters, self._storage)
            logits = self._decoder.forward(step)
        draws = [
            Draw(item.sequence.request.sampling, item.sequence.num_tokens)
            for item in plan.items
            if item.samples
        ]
        return sample(logits, draws)
