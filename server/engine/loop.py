"""The engine's loop: take messages, plan, run, commit, report."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from server.engine.request import (
    Cancel,
    Drop,
    Finished,
    FromEngine,
    Load,
    Preload,
    Submit,
    ToEngine,
)
from server.engine.scheduler import DuplicateRequestError, Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.engine.scheduler import SampledToken, StepPlan
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache

REPORT_SECONDS = 0.2
"""Least time between two reports while there is work."""

logger = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What computes a plan: the model, or a script in tests."""

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """One token for each item that samples, in the plan's order."""


class Post(Protocol):
    """Where messages come from and go to: a Mailbox, or a list in tests."""

    def receive(self, wait: bool) -> list[ToEngine]: ...

    def send(self, messages: Sequence[FromEngine]) -> None: ...


class EngineLoop:
    """Turns messages into steps and steps into messages; the only caller of the scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        kv_cache: KVCache,
        adapters: AdapterPool,
        post: Post,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._kv_cache = kv_cache
        self._adapters = adapters
        self._post = post
        self._num_steps = 0
        self._last_report = 0.0
        self._is_idle = True

    def close(self) -> None:
        """End the copies of adapters in progress; nothing may be called afterwards."""
        self._adapters.close()

    def turn(self) -> None:
        """One round: messages, then a step if there is one to run. Waits only when idle."""
        for message in self._post.receive(wait=self._is_idle):
            self._handle(message)
        plan = self._scheduler.plan()
        events: list[FromEngine] = [*self._scheduler.take_events()]
        if plan is not None:
            events += self._step(plan)
        was_idle, self._is_idle = self._is_idle, plan is None
        now = time.monotonic()
        if events or now - self._last_report >= REPORT_SECONDS or was_idle != self._is_idle:
            if self._is_idle or now - self._last_report >= REPORT_SECONDS:
                events.append(self._report())
                self._last_report = now
            self._post.send(events)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                try:
                    self._scheduler.submit(message)
                except DuplicateRequestError as error:
                    logger.error("%s", error)
            case Cancel():
                self._scheduler.cancel(message.request_id)
            case Drop():
                self._scheduler.drop(message.digest, message.abort)
            case Preload():
                self._adapters.request(message.adapter, is_preload=True)

    def _step(self, plan: StepPlan) -> list[FromEngine]:
        """Run a step. One that fails ends its own requests; the others go on."""
        self._num_steps += 1
        try:
            sampled = self._runner.run(plan)
        except Exception as error:
            ids = ", ".join(item.sequence.request_id for item in plan.items)
            logger.exception("a step failed; its requests end: %s", ids)
            text = f"the step failed: {type(error).__name__}: {error}"
            ended: list[Finished] = self._scheduler.abandon(plan, text, "internal_error")
            return [*ended, *self._scheduler.take_events()]
        return [*self._scheduler.commit(plan, sampled), *self._scheduler.take_events()]

    def _report(self) -> Load:
        scheduler, adapters = self._scheduler, self._adapters
        return Load(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=self._kv_cache.num_free,
            num_kv_pages=self._kv_cache.num_pages,
            num_adapter_pages=adapters.num_pages,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_adapter_loads=adapters.num_loads,
            num_adapter_evictions=adapters.num_evictions,
            num_cached_pages=self._kv_cache.num_cached_pages,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_host_loads=adapters.num_host_loads,
            num_cancelled_loads=adapters.num_cancelled_loads,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            adapters=adapters.report(),
        )
