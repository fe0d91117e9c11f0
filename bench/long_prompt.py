"""A long prompt arriving among decoding streams: how much slower do their tokens come?"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from bench.engine_session import EngineSession
from bench.record import percentiles

NUM_QUIET = 32
"""Tokens of every stream, after all have begun, before the long prompt is sent."""


async def long_prompt_effect(
    session: EngineSession,
    *,
    num_streams: int,
    num_prompt: int,
    long_prompt: int,
    rounds: int,
) -> dict[str, float]:
    """Inter-token seconds of base streams before a long prompt, and while it is computed.

    quiet: gaps from the moment at which every stream decodes to the sending of the long prompt;
    disturbed: gaps that end between that and the long prompt's first token or the gap after it.
    Medians over rounds of each round's p99 and of their ratio. ValueError where streams could not
    outlast it within the engine's context.
    """
    found = [await _one_round(session, num_streams, num_prompt, long_prompt) for _ in range(rounds)]
    return {
        "quiet_p99_seconds": statistics.median(quiet for quiet, _, _ in found),
        "disturbed_p99_seconds": statistics.median(disturbed for _, disturbed, _ in found),
        "ratio": statistics.median(disturbed / quiet for quiet, disturbed, _ in found),
        "first_token_seconds": statistics.median(first for _, _, first in found),
    }


async def _one_round(
    session: EngineSession, num_streams: int, num_prompt: int, long_prompt: int
) -> tuple[float, float, float]:
    """p99 of the quiet and of the disturbed gaps, and the long prompt's time to first token."""
    assert session.engine.started is not None
    if long_prompt >= session.engine.started.max_context:
        raise ValueError(
            f"a prompt of {long_prompt} tokens is none for a context of "
            f"{session.engine.started.max_context}: ask for a shorter one (--long-prompt)"
        )
    prompt = session.prompts(1, long_prompt)[0]
    found = await beside_streams(
        session, num_streams, num_prompt, lambda: session.answer(prompt, None, 1)
    )
    quiet, disturbed = (percentiles(gaps, 99)["p99"] for gaps in (found.quiet, found.disturbed))
    return quiet, disturbed, found.seconds


class Disturbance(NamedTuple):
    """Something done among decoding streams."""

    quiet: list[float]  # seconds between two tokens of a stream before it
    disturbed: list[float]  # while it was done, and up to the next token of each stream
    seconds: float  # that it took


async def beside_streams(
    session: EngineSession,
    num_streams: int,
    num_prompt: int,
    disturb: Callable[[], Awaitable[object]],
) -> Disturbance:
    """Do it once every one of num_streams base streams has NUM_QUIET tokens; they are then ended.

    RuntimeError where a stream ends before it is done.
    """
    assert session.engine.started is not None
    num_output = session.engine.started.max_context - num_prompt
    clock = asyncio.get_running_loop().time
    prompts = session.prompts(num_streams, num_prompt)
    arrivals: list[list[float]] = [[] for _ in prompts]
    ask = session.asking(prompts, [None] * num_streams, num_output)

    def noting(times: list[float]) -> Callable[[], None]:
        return lambda: times.append(clock())

    streams = [asyncio.ensure_future(ask(i, noting(times))) for i, times in enumerate(arrivals)]
    try:
        await _all_have(arrivals, 1, streams)
        begun = clock()
        await _all_have(arrivals, NUM_QUIET, streams)
        sent = clock()
        await disturb()
        done = clock()
        await _all_have(arrivals, 1, streams, since=done)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return Disturbance(_gaps(arrivals, begun, sent), _gaps(arrivals, sent, clock()), done - sent)


async def _all_have(
    arrivals: Sequence[Sequence[float]],
    count: int,
    streams: Sequence[asyncio.Future[int]],
    since: float = 0.0,
) -> None:
    """Until every stream has so many tokens after `since`; RuntimeError where one ends before."""
    while any(sum(t > since for t in times[-count:]) < count for times in arrivals):
        for stream in streams:
            if stream.done():
                raise RuntimeError(f"a stream ended after {stream.result()} tokens, too early")
        await asyncio.sleep(0.002)


def _gaps(arrivals: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Seconds between two tokens of one stream, where the later one came from begin to end."""
    return [
        later - earlier
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if begin < later <= end
    ]
