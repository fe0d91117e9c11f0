"""Engine steps held ready in this process: reached as the engine does, then run as often as wanted.

A held step is not committed, so each run computes the same: the same tokens, context and adapters.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bench.workloads import RandomPrompts
from kernels.ops import kernels_for
from server.config import Settings
from server.engine.plan import StepPlan
from server.engine.request import AdapterImage, Sampling, Submit
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.spec import engine_spec
from server.memory.adapter_pool import AdapterPool
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool
from server.model.decoder import Decoder
from server.model.weights import load_model

MAX_STEPS = 8
"""Steps before a decode that is held: its prompts, then decodes that show the scheduler's time."""


@dataclass(frozen=True, slots=True)
class Case:
    """One step of `num_rows` sequences that take turns through so many adapters; 0: base model."""

    phase: Literal["decode", "prefill"]
    num_rows: int
    num_adapters: int
    context: int  # tokens of each sequence: a decode computes the last one, a prefill all

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return self.num_rows * (self.context if self.phase == "prefill" else 1)


@dataclass(frozen=True, slots=True)
class HeldStep:
    """A case's plan, and what the scheduler took for each decode step before it."""

    case: Case
    plan: StepPlan
    schedule_seconds: tuple[float, ...]  # a commit and the plan after it; none for a prefill


class StepEngine:
    """The engine's parts that compute a step, with adapters resident, in one process.

    Steps are launched as they come, without CUDA graphs.
    """

    def __init__(self, settings: Settings, images: Sequence[AdapterImage]) -> None:
        """Raises RuntimeError where an adapter cannot be loaded."""
        self.spec = spec = engine_spec(settings)
        device, dtype = torch.device(spec.device), spec.torch_dtype
        self.kernels = kernels_for(spec.device)
        config, weights = load_model(spec.source, dtype)
        self.decoder = Decoder(config, weights, self.kernels, device, dtype, int8=spec.int8)
        pool = PagePool(spec.num_pages(), spec.geometry.page_elements, dtype, device)
        self.storage = pool.storage
        self.kv_cache = KVCache(pool, spec.geometry.block_size)
        loaded = threading.Event()
        self.adapters = AdapterPool(
            pool, spec.max_adapters, spec.max_rows, spec.layout, on_loaded=loaded.set
        )
        self.runner = Runner(self.decoder, pool, self.kv_cache, self.adapters)
        self._images = images
        self._num_submitted = 0
        self._prompts = RandomPrompts(config.vocab_size)
        for image in images:
            loaded.clear()
            if not self.adapters.request(image):
                raise RuntimeError(_too_small(f"adapter {image.digest}"))
            loaded.wait()
            for result in self.adapters.poll():
                if result.error is not None:
                    raise RuntimeError(result.error)

    def close(self) -> None:
        """End the thread that loads adapters."""
        self.adapters.close()

    def hold(self, case: Case) -> HeldStep:
        """Plan the case's step, after those that come before it; the sequences stay for good.

        Raises RuntimeError where the pool has no room for them.
        """
        num_steps = min(MAX_STEPS, case.context - 1) if case.phase == "decode" else 0
        scheduler = Scheduler(
            self.kv_cache,
            self.adapters,
            max_num_seqs=case.num_rows,
            max_batched_tokens=case.num_rows * case.context,
            max_context=case.context + 1,
        )
        for i, prompt in enumerate(self._prompts.draw([case.context - num_steps] * case.num_rows)):
            scheduler.submit(self._request(prompt, case, i))
        plan = _whole(scheduler.plan(), case)
        seconds = []
        for _ in range(num_steps):
            sampled = self.runner.run(plan)
            begin = time.perf_counter()
            scheduler.commit(plan, sampled)
            following = scheduler.plan()
            seconds.append(time.perf_counter() - begin)
            plan = _whole(following, case)
        return HeldStep(case, plan, tuple(seconds))

    def _request(self, prompt: Sequence[int], case: Case, i: int) -> Submit:
        self._num_submitted += 1
        return Submit(
            request_id=str(self._num_submitted),
            prompt_token_ids=tuple(prompt),
            sampling=Sampling(max_tokens=case.context + 1, temperature=0.0),
            adapter=self._images[i % case.num_adapters] if case.num_adapters else None,
        )


def _whole(plan: StepPlan | None, case: Case) -> StepPlan:
    if plan is None or len(plan.items) < case.num_rows:
        raise RuntimeError(_too_small(f"{case.num_rows} sequences of {case.context} tokens"))
    return plan


def _too_small(newcomer: str) -> str:
    return (
        f"the page pool has no room for {newcomer} beside what it holds: give it more "
        "(MANYLORA_POOL_BYTES), or ask for fewer --rows, --adapters or tokens"
    )
