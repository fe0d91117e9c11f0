"""The API process' side of the engine: sends requests, hands out their events, restarts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from server.engine.request import (
    Cancel,
    Drop,
    Dropped,
    Finished,
    FromEngine,
    Load,
    Preload,
    Refused,
    Settled,
    Started,
    Submit,
    ToEngine,
    TokenEvent,
)

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from server.config import Settings
    from server.engine.request import AdapterImage

RESTART_SECONDS = (0.1, 1.0, 5.0, 30.0)
"""Pause before the first, second, … start in a row that ended before the engine was ready."""

STOP_SECONDS = 5.0
"""How long the engine may take to end when it is told to."""

logger = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The engine cannot serve: what it said of the reason, or its exit code."""


class EngineClient:
    """One engine process at a time, and the requests that it works on.

    Each request has a queue of events from `generate` to its Finished. When the process ends,
    every open request gets a Finished with error_code "engine_lost", adapters count as dropped,
    and a new process is started. All methods belong to one event loop.
    """

    def __init__(self, settings: Settings) -> None:
        self.settled: Settled | None = None
        self.started: Started | None = None
        self.load: Load | None = None
        self._settings = settings
        self._refusal: str | None = None
        self._requests: dict[str, asyncio.Queue[TokenEvent | Finished]] = {}
        self._drops: dict[str, list[asyncio.Future[Dropped]]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[FromEngine])
        self._directory = Path(tempfile.mkdtemp(prefix="manylora-"))
        self._socket: zmq.asyncio.Socket | None = None
        self._process: SpawnProcess | None = None
        self._is_settled = asyncio.Event()
        self._ready = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._num_starts = 0

    @property
    def pid(self) -> int | None:
        """Of the engine process; None while there is none."""
        return None if self._process is None else self._process.pid

    def spawn(self) -> None:
        """Start the process; what it needs of the event loop begins with `start`."""
        self._num_starts += 1
        address = f"ipc://{self._directory}/engine-{self._num_starts}"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._process = multiprocessing.get_context("spawn").Process(
            target=_run_engine,
            args=(self._settings, address),
            name="manylora-engine",
            daemon=True,
        )
        self._process.start()

    async def settle(self) -> Settled:
        """Wait until the engine knows what it will be, long before it serves.

        Raises EngineStartError when it refuses or ends before that.
        """
        await self._until(self._is_settled)
        assert self.settled is not None
        return self.settled

    async def start(self) -> None:
        """Wait until the engine serves, and watch it from then on; raises as `settle`."""
        await self._until(self._ready)

    async def stop(self) -> None:
        """End the process; open requests get their Finished."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineStartError):
                await self._supervisor
        process = self._process
        if process is not None and process.is_alive():
            process.terminate()
            await asyncio.to_thread(process.join, STOP_SECONDS)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)
        self._lose_engine("the server is stopping")
        shutil.rmtree(self._directory, ignore_errors=True)

    async def generate(self, request: Submit) -> AsyncGenerator[TokenEvent | Finished, None]:
        """The request's events, exactly one Finished, last; closing it early cancels it.

        ValueError at the id of a live request.
        """
        request_id = request.request_id
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is live already: give each its own id")
        if self.started is None:
            yield _lost(request_id, "the engine is starting")
            return
        events = self._requests[request_id] = asyncio.Queue()
        try:
            self._send(request)
            while True:
                event = await events.get()
                if isinstance(event, Finished):
                    del self._requests[request_id]
                    yield event
                    return
                yield event
        finally:
            if self._requests.pop(request_id, None) is not None:
                self._send(Cancel(request_id=request_id))

    async def cancel(self, request_id: str) -> None:
        """End a request: its Finished says "cancelled". Unknown and ended ids are ignored."""
        if request_id in self._requests:
            self._send(Cancel(request_id=request_id))

    def end_requests(self, why: str) -> None:
        """Answer every open request with an error, whatever the engine does."""
        for request_id, queue in self._requests.items():
            queue.put_nowait(_lost(request_id, why))

    async def preload(self, adapter: AdapterImage) -> None:
        """Ask for an adapter to be made resident where that evicts nothing."""
        if self.started is not None:
            self._send(Preload(adapter=adapter))

    async def drop(self, digest: str, abort: bool = False) -> Dropped:
        """Free an adapter once its requests have ended; with `abort`, cancel them."""
        if self.started is None:
            return Dropped(digest=digest, freed_bytes=0)
        answer: asyncio.Future[Dropped] = asyncio.get_running_loop().create_future()
        self._drops.setdefault(digest, []).append(answer)
        self._send(Drop(digest=digest, abort=abort))
        return await answer

    def _send(self, message: ToEngine) -> None:
        # With no high-water mark a PAIR socket that is bound never blocks; a dead engine's
        # messages go with its socket.
        if self._socket is not None:
            self._socket.send(self._encoder.encode(message))

    async def _until(self, reached: asyncio.Event) -> None:
        """Wait for an event of the first start, which the supervisor may have to give up."""
        if self._process is None:
            self.spawn()
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())
        waiter = asyncio.create_task(reached.wait())
        await asyncio.wait({waiter, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
        if not waiter.done():
            waiter.cancel()
            await self._supervisor

    async def _supervise(self) -> None:
        """Read from the engine until it ends, then start it again; raises if it never started."""
        failures = 0
        while True:
            assert self._process is not None
            was_ready = await self._read_until_ended()
            why, self._refusal = self._refusal, None
            if why is None:
                why = f"the engine ended with exit code {self._process.exitcode}"
            self._lose_engine("the engine process ended")
            if not self._ready.is_set():
                raise EngineStartError(why)
            failures = 0 if was_ready else failures + 1
            pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)]
            logger.error("%s; the engine is started again in %s s", why, pause)
            await asyncio.sleep(pause)
            self.spawn()

    async def _read_until_ended(self) -> bool:
        """Take in the engine's messages until its process ends; whether it had started."""
        assert self._process is not None
        assert self._socket is not None
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, ended.set)
        reader = asyncio.create_task(self._read(self._socket))
        try:
            waiter = asyncio.create_task(ended.wait())
            await asyncio.wait({reader, waiter}, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            if reader.done() and not ended.is_set():
                logger.error("the engine cannot be understood", exc_info=reader.exception())
                self._process.kill()
        finally:
            reader.cancel()
            loop.remove_reader(self._process.sentinel)
        await asyncio.to_thread(self._process.join)
        return self.started is not None

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            for message in self._decoder.decode(await socket.recv()):
                self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case TokenEvent() | Finished():
                queue = self._requests.get(message.request_id)
                if queue is not None:
                    queue.put_nowait(message)
            case Load():
                self.load = message
            case Dropped():
                waiting = self._drops.get(message.digest)
                if waiting:
                    answer = waiting.pop(0)
                    if not answer.done():
                        answer.set_result(message)
            case Settled():
                if self.settled is None:
                    self.settled = message
                    self._is_settled.set()
                elif self.settled != message:
                    self._refuse("the base model has changed since the start: restart the server")
            case Started():
                self.started = message
                self._ready.set()
            case Refused():
                self._refuse(message.error)

    def _refuse(self, why: str) -> None:
        """End the process, which has nothing more to say."""
        assert self._process is not None
        self._refusal = why
        self._process.kill()

    def _lose_engine(self, why: str) -> None:
        """Answer everything that waits for the engine, and forget its socket."""
        self.started = self.load = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.end_requests(why)
        for digest, answers in self._drops.items():
            for answer in answers:
                if not answer.done():
                    answer.set_result(Dropped(digest=digest, freed_bytes=0))
        self._drops.clear()


def _run_engine(settings: Settings, address: str) -> None:
    """In the new process: import what runs the engine, which the API process never needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the API decides
    from server.engine.process import run_engine

    run_engine(settings, address)


def _lost(request_id: str, why: str) -> Finished:
    return Finished(
        request_id=request_id,
        reason="error",
        error=f"{why}: send the request again",
        error_code="engine_lost",
    )
