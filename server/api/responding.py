"""From pieces to the HTTP answer, one body or an event stream, the same way for every shape."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.api.answers import Completion, Json, Usage
from server.api.connection import EventStream, while_connected
from server.api.generation import Generation, Piece
from server.errors import InternalError, ServerError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """How a route writes pieces: as chunks of a stream, or as one body."""

    def chunks(self, piece: Piece, *, is_first: bool) -> Iterable[Completion]:
        """The chunks of one piece; `is_first` of its choice."""

    def usage_chunk(self, piece: Piece, usage: Usage) -> Completion:
        """The chunk after all others, without choices; `piece` is the stream's last."""

    def whole(self, choices: list[list[Piece]], usage: Usage) -> Completion:
        """The body, given each choice's pieces."""


async def respond(
    request: Request, generation: Generation, shape: Shape, *, stream: bool, usage: bool
) -> Response:
    """Run a generation and answer; `usage` asks for a stream's usage chunk.

    The answer begins after the engine's first event, so that its headers say what was applied
    and an early fault gets its own status. Raises ServerError, or ClientDisconnect.
    """
    pieces = generation.pieces()
    if not stream:
        return await while_connected(request.receive, _whole(generation, shape, pieces))
    first = await while_connected(request.receive, anext(pieces))
    events = _events(generation, shape, first, pieces, usage=usage)
    return EventStream(events, generation.headers(first.adapter))


async def _whole(
    generation: Generation, shape: Shape, pieces: AsyncGenerator[Piece, None]
) -> Response:
    choices: list[list[Piece]] = [[] for _ in generation.submits]
    async with aclosing(pieces):
        async for piece in pieces:
            choices[piece.index].append(piece)
    usage = generation.usage([choice[-1] for choice in choices])
    return Json(shape.whole(choices, usage), headers=generation.headers(choices[0][-1].adapter))


async def _events(
    generation: Generation,
    shape: Shape,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    *,
    usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The stream's lines; a fault becomes one `data:` line with the error object."""
    last: dict[int, Piece] = {}
    try:
        async with aclosing(_chain(first, pieces)) as chained:
            async for piece in chained:
                for chunk in shape.chunks(piece, is_first=piece.index not in last):
                    yield _data(chunk)
                last[piece.index] = piece
        if usage:
            total = generation.usage([last[index] for index in sorted(last)])
            yield _data(shape.usage_chunk(piece, total))
    except ServerError as error:
        yield _data(error.body())
    except Exception:
        logger.exception("%s: the stream failed", generation.completion_id)
        yield _data(InternalError("an internal error ended the stream: try again").body())
    yield DONE


async def _chain(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


def _data(content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
