"""The engine that is simulated: the server's own loop, scheduler and memory around a cost model.

The only file that knows how they are built and what a plan looks like.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from bench.simulation.cost_model import CostModel
from bench.simulation.fleet import Fleet
from bench.simulation.machine import Machine
from bench.simulation.transfers import SimulatedLoader, VirtualClock
from server.engine.loop import EngineLoop, Post
from server.engine.plan import SampledToken, StepPlan
from server.engine.process import divide
from server.engine.request import AdapterImage, Sampling, Submit
from server.engine.scheduler import Scheduler
from server.engine.spec import LOAD_BYTES_PER_SECOND, OPERATIONS_PER_SECOND
from server.memory.adapter_pool import AdapterPool
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool
from server.roofline.capacity import capacity
from server.roofline.costs import Query
from server.roofline.shapes import ITEM_BYTES, ModelShape

PAGE_ELEMENTS = 16
"""Of a page in the simulation: nothing lies in it, so it is as small as a page can be."""

PROMPT_STRIDE = 1024
"""Prompt i counts from i times this: prompts share no prefix, so no prefix cache can help."""

TOKEN = SampledToken(0)
"""What the simulated model says; nothing stops at it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The server under simulation: its machine and its settings."""

    machine: Machine
    pool_share: float = 1.0  # of the page pool that the machine has room for
    adapter_share: float | None = None  # of the pool's pages, set apart for adapters; None: unified
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    max_adapters: int = 256
    is_fair: bool = True  # tenants are adapters; if not, all requests are one tenant's
    queue_timeout: float | None = None  # seconds that a request may wait

    def num_pages(self, fleet: Fleet) -> int:
        """Pages of the pool beside the model's weights, as the server takes them on a GPU."""
        room = capacity(fleet.shape, self.machine.hardware, 1, 1, (1,), 0)
        return int(room.num_pages * self.pool_share)


@dataclass(slots=True)
class StepCounts:
    """Sums over the steps of a run; changed only by SimulatedRunner."""

    num_steps: int = 0
    num_tokens: int = 0
    num_sequences: int = 0
    num_distinct: int = 0  # adapters
    most_distinct: int = 0
    most_sequences: int = 0
    base_seconds: float = 0.0
    adapter_seconds: float = 0.0
    fixed_seconds: float = 0.0


class SimulatedRunner:
    """Takes as much virtual time for a plan as the cost model says, and samples token 0."""

    def __init__(self, model: CostModel, clock: VirtualClock, fleet: Fleet) -> None:
        self.counts = StepCounts()
        self._model = model
        self._clock = clock
        self._fleet = fleet

    def run(self, plan: StepPlan) -> list[SampledToken]:
        queries: list[Query] = []
        query_ranks: list[int] = []
        distinct: dict[int, int] = {}  # slot to rank
        for item in plan.items:
            queries.append(Query(item.num_tokens, item.start + item.num_tokens, item.samples))
            image = item.sequence.request.adapter
            rank = 0 if image is None else self._fleet.kind(image).rank
            query_ranks.append(rank)
            if rank:
                distinct[item.slot] = rank
        cost = self._model.cost(queries, query_ranks, tuple(distinct.values()))
        self._clock.advance(cost.seconds)
        counts = self.counts
        counts.num_steps += 1
        counts.num_tokens += plan.num_tokens
        counts.num_sequences += len(queries)
        counts.num_distinct += len(distinct)
        counts.most_distinct = max(counts.most_distinct, len(distinct))
        counts.most_sequences = max(counts.most_sequences, len(queries))
        counts.base_seconds += cost.base
        counts.adapter_seconds += cost.adapters
        counts.fixed_seconds += cost.fixed
        return [TOKEN] * plan.num_samples


class SimulatedEngine:
    """One engine with nothing in it yet; `turn` is one round of the server's loop."""

    def __init__(self, setup: Setup, fleet: Fleet, clock: VirtualClock, post: Post) -> None:
        pool = PagePool(setup.num_pages(fleet), PAGE_ELEMENTS, torch.float32, "cpu")
        kv_pool, adapter_pool = divide(pool, setup.adapter_share)
        self._pools = {kv_pool, adapter_pool}  # one where they share it
        geometry, layout = fleet.shape.page_geometry(), _small_layout()
        entries = layout.num_layers * len(layout.targets)
        self.loader = SimulatedLoader(fleet, setup.machine, clock, entries, PAGE_ELEMENTS)
        self.kv_cache = KVCache(
            kv_pool,
            geometry.block_size,
            page_seconds=_compute_seconds(fleet.shape, geometry.block_size),
        )
        self.adapters = AdapterPool(
            adapter_pool,
            setup.max_adapters,
            fleet.largest.num_pages,
            layout,
            loader=self.loader,
            load_timeout_seconds=math.inf,
            page_seconds=geometry.page_elements * ITEM_BYTES / LOAD_BYTES_PER_SECOND["cuda"],
            clock=clock,
        )
        self.scheduler = Scheduler(
            self.kv_cache,
            self.adapters,
            max_num_seqs=setup.max_num_seqs,
            max_batched_tokens=setup.max_batched_tokens,
            max_context=fleet.shape.max_context,
            attention_context=_attention_context(fleet.shape),
            clock=clock,
        )
        model = CostModel(fleet.shape, setup.machine, fleet.targets)
        self.runner = SimulatedRunner(model, clock, fleet)
        loop = EngineLoop(self.scheduler, self.runner, self.kv_cache, self.adapters, post)
        self.turn = loop.turn

    def check(self) -> None:
        """Recompute every owner's invariants; AssertionError when one does not hold."""
        for pool in self._pools:
            pool.check()
        self.kv_cache.check()
        self.adapters.check()
        self.scheduler.check()
        held = self.kv_cache.num_pages + self.adapters.num_pages
        free = sum(pool.num_free for pool in self._pools) + self.kv_cache.num_cached_pages
        assert held + free == sum(pool.num_pages for pool in self._pools), "pages without an owner"


def submission(
    setup: Setup, image: AdapterImage | None, number: int, num_prompt: int, num_output: int
) -> Submit:
    """Request `number`; its prompt has no token in common with another's of this stride."""
    first = number * PROMPT_STRIDE
    return Submit(
        request_id=str(number),
        prompt_token_ids=tuple(range(first, first + num_prompt)),
        sampling=Sampling(max_tokens=num_output),
        adapter=image,
        tenant=None if setup.is_fair else "everyone",
        queue_timeout=setup.queue_timeout,
    )


def _small_layout() -> BaseLayout:
    targets = tuple(TargetShape(name, 8, 8) for name in TARGET_PATHS)
    return BaseLayout("simulated", 1, targets, PAGE_ELEMENTS, "float32")


# What EngineSpec derives from a model that was read.


def _attention_context(shape: ModelShape) -> int:
    return max(1, _products(shape) // (2 * shape.q_size) // 2)


def _compute_seconds(shape: ModelShape, block_size: int) -> float:
    num_operations = 2 * shape.num_layers * _products(shape) * block_size
    return num_operations / OPERATIONS_PER_SECOND["cuda"]


def _products(shape: ModelShape) -> int:
    return sum(target.in_features * target.out_features for target in shape.targets)
