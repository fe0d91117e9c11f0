"""A closed loop of streamed HTTP completions, on bare sockets: the client shares the cores.

An HTTP library would take a noticeable share of two cores at hundreds of events a second.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from bench.rivals.environments import RivalError
from bench.rivals.workload import Trace

LIMIT_BYTES = 1 << 20
"""Longest line of an answer."""


@dataclass(frozen=True)
class Request:
    """One POST and how its answer is read."""

    path: str
    body: dict[str, Any]
    text_of: Callable[[dict[str, Any]], str | None]
    """The text that an event brings; None where it brings no token."""
    count_of: Callable[[dict[str, Any]], int | None]
    """The number of the answer's tokens, from the event that tells it."""


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    text: str
    trace: Trace


def ask_all(port: int, requests: Iterable[Request], concurrency: int) -> list[Answer]:
    """The answers, in order; as one ends, the next request is sent. Raises RivalError."""
    return asyncio.run(_closed_loop(port, list(requests), concurrency))


async def _closed_loop(port: int, requests: list[Request], concurrency: int) -> list[Answer]:
    answers: dict[int, Answer] = {}
    waiting: Iterator[tuple[int, Request]] = iter(enumerate(requests))

    async def client() -> None:
        for index, request in waiting:
            answers[index] = await _ask(port, request)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
    except* (OSError, ValueError, EOFError) as errors:
        raise RivalError(f"a request failed: {errors.exceptions[0]}") from errors
    return [answers[index] for index in range(len(requests))]


async def _ask(port: int, request: Request) -> Answer:
    sent = time.perf_counter()
    arrivals: list[float] = []
    texts: list[str] = []
    num_tokens = 0
    async with aclosing(_events(port, request)) as events:
        async for event in events:
            text = request.text_of(event)
            if text is not None:
                arrivals.append(time.perf_counter())
                texts.append(text)
            num_tokens = request.count_of(event) or num_tokens
    if not arrivals:
        raise ValueError("an answer without a token")
    return Answer("".join(texts), Trace(sent, tuple(arrivals), num_tokens))


async def _events(port: int, request: Request) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of each `data:` line; ValueError for an answer other than 200, or an error event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT_BYTES)
    try:
        body = json.dumps(request.body).encode()
        head = (
            f"POST {request.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = (await reader.readline()).decode(errors="replace")
        if " 200 " not in status:
            rest = (await reader.read(2000)).decode(errors="replace")
            raise ValueError(f"{request.path} answered {status.strip()}: {rest[-500:]}")
        async for line in reader:  # sizes of chunks are lines too, and are passed over
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"{request.path} streamed an error: {event['error']}")
                yield event
    finally:
        writer.close()
