"""The API process' part of one server: tokenizer, store and app; the banner when all is ready.

Imported, and put together, while the engine starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.engine.client import EngineStartError
from server.errors import CannotServe
from server.model.source import ModelSource
from server.model.tokenizer import load_tokenizer
from server.registration import register_adapters
from server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import socket
    from contextlib import AbstractAsyncContextManager

    from fastapi import FastAPI

    from server.config import Settings
    from server.engine.client import EngineClient
    from server.engine.request import Settled

GRACE_SECONDS = 4
"""How long open answers may go on after a signal; then they end with an error."""


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn would end the process by them before the engine has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(
    settings: Settings,
    settled: Settled,
    engine: EngineClient,
    listener: socket.socket,
    started: float,
    on_signal: Callable[[Callable[[], object]], None],
) -> None:
    """Serve HTTP on `listener` until a signal; the banner says the seconds since `started`.

    `on_signal(act)` sets what a signal does from now on. Raises CannotServe, ModelError,
    AdapterStoreError or EngineStartError where there is no serving.
    """
    with contextlib.closing(_open_store(settings, settled)) as store:  # the data directory is ours
        tokenizer = await asyncio.to_thread(_tokenizer, settings, settled)
        await asyncio.to_thread(register_adapters, settings, store)
        model_name = settings.served_model_name or settled.model_name
        _check_names(model_name, store)

        def app_of(running: AbstractAsyncContextManager[None]) -> FastAPI:
            return create_app(
                settings=settings,
                engine=engine,
                store=store,
                tokenizer=tokenizer,
                model_name=model_name,
                max_context=settled.max_context,
                running=running,
            )

        def show_banner() -> None:
            _show_banner(listener, model_name, settled, store, time.monotonic() - started)

        await _serve_app(app_of, engine, listener, show_banner, on_signal)


async def _serve_app(
    app_of: Callable[[AbstractAsyncContextManager[None]], FastAPI],
    engine: EngineClient,
    listener: socket.socket,
    show_banner: Callable[[], None],
    on_signal: Callable[[Callable[[], object]], None],
) -> None:
    """Serve the app that `app_of` makes around a lifespan: in it, the engine comes up."""
    failures: list[EngineStartError] = []

    @contextlib.asynccontextmanager
    async def running() -> AsyncIterator[None]:
        async def start() -> None:
            try:
                await engine.start()
            except EngineStartError as error:
                failures.append(error)
                server.should_exit = True
                return
            show_banner()

        task = asyncio.create_task(start())
        yield
        task.cancel()

    server = _Server(
        uvicorn.Config(
            app_of(running()),
            log_level="warning",
            timeout_graceful_shutdown=GRACE_SECONDS + 2,
            lifespan="on",
        )
    )

    def stop() -> None:
        server.handle_exit(signal.SIGINT, None)  # the second time: without waiting
        asyncio.get_running_loop().call_later(
            GRACE_SECONDS, engine.end_requests, "the server is stopping"
        )

    on_signal(stop)
    await server.serve(sockets=[listener])
    if failures:
        raise failures[0]


def _check_names(name: str, store: AdapterStore) -> None:
    """Refuse to start where `model` could mean the base model and an adapter."""
    if name in {adapter.adapter_id for adapter in store.adapters()}:
        raise CannotServe(
            f"the base model and an adapter are both called {name!r}: give the base model another "
            "name with --served-model-name"
        )


def _open_store(settings: Settings, settled: Settled) -> AdapterStore:
    try:
        return AdapterStore(
            settings.data_dir,
            settled.layout,
            max_rank=settings.max_adapter_rank,
            max_pages=settled.num_pages,
        )
    except OSError as error:
        raise CannotServe(
            f"cannot keep adapters in {settings.data_dir}: {error.strerror}. Choose another "
            "directory with --data-dir"
        ) from error


def _tokenizer(settings: Settings, settled: Settled) -> Tokenizer:
    source = ModelSource(settled.model_name, Path(settled.model_path))
    hf = load_tokenizer(source, settings.data_dir / "cache")
    own = () if hf.eos_token_id is None else (hf.eos_token_id,)
    # Llama 3 and others end an answer by more tokens than their tokenizer says.
    return Tokenizer(hf, tuple(dict.fromkeys((*own, *settled.eos_token_ids))))


def _show_banner(
    listener: socket.socket, model_name: str, settled: Settled, store: AdapterStore, seconds: float
) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = [adapter.adapter_id for adapter in store.adapters()]
    body = {
        "model": model_name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    if names:
        body["adapter_id"] = "pirate" if "pirate" in names else names[0]
    sys.stdout.write(
        f"\nmanylora serves {model_name} ({settled.dtype} on {settled.device}) at {url}, "
        f"ready after {seconds:.0f} s\n"
        f"adapters: {', '.join(names) or 'none yet; upload one to POST /v1/adapters'}\n\n"
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'\n\n"
        f"or open {url}/ in a browser\n"
    )
    sys.stdout.flush()
