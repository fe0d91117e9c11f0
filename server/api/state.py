"""What every route needs: settings, engine, adapters, tokenizer, metrics; and the engine's face."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

from starlette.requests import Request

from adapters_store.store import AdapterStore
from server.config import Settings
from server.engine.request import (
    AdapterImage,
    Dropped,
    Finished,
    Load,
    Started,
    Submit,
    TokenEvent,
)
from server.errors import EngineUnavailable
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer


class Engine(Protocol):
    """The engine as the routes see it."""

    @property
    def started(self) -> Started | None:
        """None while the engine is starting or restarting."""

    @property
    def load(self) -> Load | None:
        """The newest report."""

    def generate(self, request: Submit) -> AsyncGenerator[TokenEvent | Finished, None]:
        """The request's events, exactly one Finished, last; closing it early cancels."""

    async def cancel(self, request_id: str) -> None:
        """End a request: its Finished says "cancelled". Unknown and ended ids are ignored."""

    async def preload(self, adapter: AdapterImage) -> None:
        """Ask for an adapter to be made resident where that costs nobody anything."""

    async def drop(self, digest: str, abort: bool = False) -> Dropped:
        """Free an adapter once its requests have ended, or end them."""


@dataclass(slots=True)
class AppState:
    """One app's dependencies, all of them made by the caller and outliving the app.

    `deleting` holds the adapters whose requests are being drained: no new request may name them;
    only the adapter routes write it. `running` has the open engine requests of each adapter, by
    name, since two names may have the same weights; only `listed` writes it.
    """

    settings: Settings
    engine: Engine
    store: AdapterStore
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str  # public name of the base model
    max_context: int  # the model's own, or the setting; the pool may allow less
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds
    deleting: set[str] = field(default_factory=set)
    running: dict[str, set[str]] = field(default_factory=dict)

    @contextmanager
    def listed(self, adapter_ids: Iterable[str], request_id: str) -> Iterator[None]:
        """Have a request among the running ones of its adapters, of which the base has none."""
        names = set(adapter_ids)
        for name in names:
            self.running.setdefault(name, set()).add(request_id)
        try:
            yield
        finally:
            for name in names:
                self.running[name].discard(request_id)
                if not self.running[name]:
                    del self.running[name]

    def running_context(self) -> int:
        """Longest prompt and completion now; EngineUnavailable while the engine starts."""
        if self.engine.started is None:
            raise EngineUnavailable("the engine is starting: try again in a moment")
        return min(self.max_context, self.engine.started.max_context)


def state_of(request: Request) -> AppState:
    """The state of the app that serves `request`."""
    return cast(AppState, request.app.state.server)
