"""One server from start to end: the engine first, the rest of the API process beside its start.

Imports little, so that the engine's process begins at once; `server.frontend` is the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters_store.errors import AdapterStoreError
from server.engine.client import EngineClient, EngineStartError
from server.errors import CannotServe
from server.model.config import ModelError
from server.registration import adapter_directories

if TYPE_CHECKING:
    from types import ModuleType

    from server.config import Settings


def serve(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    started = time.monotonic()
    try:
        with contextlib.closing(_listen(settings)) as listener:
            adapter_directories(settings)  # before anything that takes time
            return asyncio.run(_run(settings, listener, started))
    except asyncio.CancelledError:  # a signal, before there was a server to take it
        return 0
    except (CannotServe, ModelError, AdapterStoreError, EngineStartError) as error:
        sys.stderr.write(f"manylora: {error}\n")
        return 1


async def _run(settings: Settings, listener: socket.socket, started: float) -> int:
    task = asyncio.current_task()
    assert task is not None
    _on_signal(task.cancel)
    engine = EngineClient(settings)
    engine.spawn()  # the longest part of a start; the rest goes on beside it
    try:
        frontend = await asyncio.to_thread(_import_frontend)
        settled = await engine.settle()
        await frontend.run(settings, settled, engine, listener, started, _on_signal)
        return 0
    finally:
        await engine.stop()


def _import_frontend() -> ModuleType:
    from server import frontend

    return frontend


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
        raise CannotServe(
            f"cannot listen on {settings.host} port {settings.port}: "
            f"{getattr(error, 'strerror', error)}. Choose another with --host and --port "
            "(0 picks a free port)"
        ) from error
    return listener
