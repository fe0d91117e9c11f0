"""The HTTP application: every route, its dependencies, its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from adapters_store.store import AdapterStore
from server.api import adapters, chat, completions, faults, models, operations, page
from server.api.request_id import RequestIds
from server.api.state import AppState, Engine
from server.config import Settings
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer


def create_app(
    *,
    settings: Settings,
    engine: Engine,
    store: AdapterStore,
    tokenizer: Tokenizer,
    model_name: str,
    max_context: int,
    running: AbstractAsyncContextManager[object] | None = None,
) -> FastAPI:
    """The app; it opens no file and starts nothing itself.

    `model_name` is the base model's public name, `max_context` the longest prompt and completion
    in tokens. `running` is entered when the app starts and left when it stops, on the app's event
    loop: the engine client's, for example.
    """
    state = AppState(
        settings=settings,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        metrics=Metrics(lambda: engine.load),
        model_name=model_name,
        max_context=max_context,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if running is None:
            yield
            return
        async with running:
            yield

    # No generated schema: bodies are read by `server.api.body`, and docs/api.md tells them whole.
    app = FastAPI(title="manylora", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.server = state
    app.add_middleware(RequestIds, metrics=state.metrics)
    faults.install(app)
    for module in (chat, completions, models, adapters, operations, page):
        app.include_router(module.router)
    return app
