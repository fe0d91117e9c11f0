"""One server from start to end: store, engine, app, and the banner when it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from adapters_store.errors import AdapterStoreError
from adapters_store.shipped import shipped_adapters
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.config import EMBEDDED_MODEL, Settings
from server.engine.client import EngineClient, EngineStartError
from server.engine.spec import EngineSpec, engine_spec
from server.model.config import ModelError
from server.model.tokenizer import load_tokenizer
from server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

GRACE_SECONDS = 4
"""How long open answers may go on after a signal; then they end with an error."""

logger = logging.getLogger("manylora")


class _CannotServe(Exception):
    """A fault at the start; the message is all that the user needs."""


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn would end the process by them before the engine has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    started = time.monotonic()
    try:
        with contextlib.closing(_listen(settings)) as listener:
            adapter_directories(settings)  # before anything that takes time
            spec = engine_spec(settings)
            return asyncio.run(_run(settings, spec, listener, started))
    except asyncio.CancelledError:  # a signal, before there was a server to take it
        return 0
    except (_CannotServe, ModelError, AdapterStoreError, EngineStartError) as error:
        sys.stderr.write(f"manylora: {error}\n")
        return 1


async def _run(
    settings: Settings, spec: EngineSpec, listener: socket.socket, started: float
) -> int:
    task = asyncio.current_task()
    assert task is not None
    _on_signal(task.cancel)
    engine = EngineClient(spec)
    engine.spawn()  # the longest part of a start; the rest goes on beside it
    try:
        tokenizer = await asyncio.to_thread(_tokenizer, settings, spec)
        with contextlib.closing(_open_store(settings, spec)) as store:
            await asyncio.to_thread(register_adapters, settings, store)
            _check_names(settings, spec, store)
            return await _serve_app(settings, spec, listener, started, engine, store, tokenizer)
    finally:
        await engine.stop()


async def _serve_app(
    settings: Settings,
    spec: EngineSpec,
    listener: socket.socket,
    started: float,
    engine: EngineClient,
    store: AdapterStore,
    tokenizer: Tokenizer,
) -> int:
    model_name = _model_name(settings, spec)
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
            _show_banner(listener, model_name, spec, store, time.monotonic() - started)

        task = asyncio.create_task(start())
        yield
        task.cancel()

    app: FastAPI = create_app(
        settings=settings,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        model_name=model_name,
        max_context=spec.max_context,
        running=running(),
    )
    server = _Server(
        uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS + 2, lifespan="on"
        )
    )

    def stop() -> None:
        server.handle_exit(signal.SIGINT, None)  # the second time: without waiting
        asyncio.get_running_loop().call_later(
            GRACE_SECONDS, engine.end_requests, "the server is stopping"
        )

    _on_signal(stop)
    await server.serve(sockets=[listener])
    if failures:
        raise failures[0]
    return 0


def adapter_directories(settings: Settings) -> list[tuple[str, Path]]:
    """Name and directory of each NAME=DIR of the settings; _CannotServe for what is none."""
    found = []
    for entry in settings.adapter:
        name, _, path = entry.partition("=")
        directory = Path(path).expanduser()
        if not name or not path or not directory.is_dir():
            raise _CannotServe(
                f"--adapter {entry!r} is not NAME=DIR with a directory that PEFT has written"
            )
        found.append((name, directory))
    return found


def register_adapters(settings: Settings, store: AdapterStore) -> None:
    """Add the shipped adapters whose names are free, and those that the settings name.

    Raises _CannotServe for a NAME=DIR that cannot be registered.
    """
    if settings.shipped_adapters and settings.model == EMBEDDED_MODEL:
        known = {adapter.adapter_id for adapter in store.adapters()}
        for name, directory in shipped_adapters().items():
            if name not in known:
                logger.info("registering the shipped adapter %s", name)
                store.add(name, directory, description="shipped with manylora")
    for name, directory in adapter_directories(settings):
        try:
            store.add(name, directory)
        except AdapterStoreError as error:
            raise _CannotServe(f"--adapter {name}={directory}: {error}") from error


def _model_name(settings: Settings, spec: EngineSpec) -> str:
    return settings.served_model_name or spec.source.name


def _check_names(settings: Settings, spec: EngineSpec, store: AdapterStore) -> None:
    """Refuse to start where `model` could mean the base model and an adapter."""
    name = _model_name(settings, spec)
    if name in {adapter.adapter_id for adapter in store.adapters()}:
        raise _CannotServe(
            f"the base model and an adapter are both called {name!r}: give the base model another "
            "name with --served-model-name"
        )


def _on_signal(act: Callable[[], object]) -> None:
    """What SIGINT and SIGTERM do from now on."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, act)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen()  # at once: bound alone, a second server could take the port as well
    except (OSError, UnicodeError) as error:
        listener.close()
        raise _CannotServe(
            f"cannot listen on {settings.host} port {settings.port}: "
            f"{getattr(error, 'strerror', error)}. Choose another with --host and --port "
            "(0 picks a free port)"
        ) from error
    return listener


def _open_store(settings: Settings, spec: EngineSpec) -> AdapterStore:
    max_pages = None if spec.pool_bytes is None else spec.num_pages()
    try:
        return AdapterStore(
            settings.data_dir, spec.layout, max_rank=spec.max_adapter_rank, max_pages=max_pages
        )
    except OSError as error:
        raise _CannotServe(
            f"cannot keep adapters in {settings.data_dir}: {error.strerror}. Choose another "
            "directory with --data-dir"
        ) from error


def _tokenizer(settings: Settings, spec: EngineSpec) -> Tokenizer:
    hf = load_tokenizer(spec.source, settings.data_dir / "cache")
    own = () if hf.eos_token_id is None else (hf.eos_token_id,)
    # Llama 3 and others end an answer by more tokens than their tokenizer says.
    return Tokenizer(hf, tuple(dict.fromkeys((*own, *spec.config.eos_token_ids))))


def _show_banner(
    listener: socket.socket, model_name: str, spec: EngineSpec, store: AdapterStore, seconds: float
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
        f"\nmanylora serves {model_name} ({spec.dtype} on {spec.device}) at {url}, "
        f"ready after {seconds:.0f} s\n"
        f"adapters: {', '.join(names) or 'none yet; upload one to POST /v1/adapters'}\n\n"
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'\n\n"
        f"or open {url}/ in a browser\n"
    )
    sys.stdout.flush()
