"""Plays requests against anything that answers: open loop at fixed times, or closed loop.

Knows neither engine nor HTTP: it is given an `Ask`, and keeps the time of every piece of answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.record import percentiles

Ask = Callable[[int, Callable[[], None]], Awaitable[int]]
"""Sends request i, calls the function at each piece of its answer, returns the output tokens.

Raises RequestFailed where the server refused or broke it off.
"""


class RequestFailed(Exception):
    """The server did not answer one request to its end; others may go on."""


@dataclass(slots=True)
class Timeline:
    """When one request was due, sent and answered; seconds since the start of the run.

    Open loop: latencies count from `due`, whenever it was sent. Closed loop: due is sent.
    """

    due: float
    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = np.nan
    num_tokens: int = 0
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        return self.pieces[0] - self.due

    @property
    def inter_token_seconds(self) -> list[float]:
        return np.diff(self.pieces).tolist()


async def open_loop(due_seconds: NDArray[np.float64], ask: Ask) -> list[Timeline]:
    """Send request i at due_seconds[i], however many are still unanswered, and await them all.

    A late answer delays no later request, and none is left out: no coordinated omission.
    """
    clock = asyncio.get_running_loop().time
    start = clock()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for i, due in enumerate(due_seconds.tolist()):
            await asyncio.sleep(max(0.0, start + due - clock()))
            tasks.append(group.create_task(_answered(i, due, start, ask)))
    return [task.result() for task in tasks]


async def closed_loop(num_requests: int, concurrency: int, ask: Ask) -> list[Timeline]:
    """Keep `concurrency` requests under way until num_requests have been answered."""
    clock = asyncio.get_running_loop().time
    start = clock()
    remaining = iter(range(num_requests))
    timelines: list[Timeline] = []

    async def client() -> None:
        for i in remaining:  # shared: each number goes to one client
            timeline = await _answered(i, clock() - start, start, ask)
            timelines.append(timeline)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return timelines


async def _answered(i: int, due: float, start: float, ask: Ask) -> Timeline:
    clock = asyncio.get_running_loop().time
    timeline = Timeline(due=due, sent=clock() - start)
    try:
        timeline.num_tokens = await ask(i, lambda: timeline.pieces.append(clock() - start))
    except RequestFailed as error:
        timeline.error = str(error)
    timeline.ended = clock() - start
    return timeline


def figures(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Rates over the whole run, and percentiles over its completed requests.

    Seconds from the run's start to its last completion are the denominator of every rate.
    send_lag: how late this process sent what was due; large ones say that it was too busy.
    """
    completed = [t for t in timelines if t.error is None]
    seconds = max((t.ended for t in completed), default=np.nan)
    first = percentiles([t.first_token_seconds for t in completed], 50, 90, 99)
    between = percentiles([x for t in completed for x in t.inter_token_seconds], 50, 99)
    return {
        "num_requests": len(timelines),
        "num_failed": len(timelines) - len(completed),
        "seconds": seconds,
        "completed_per_second": len(completed) / seconds,
        "output_tokens_per_second": sum(t.num_tokens for t in completed) / seconds,
        **{f"first_token_{name}_seconds": value for name, value in first.items()},
        **{f"inter_token_{name}_seconds": value for name, value in between.items()},
        "send_lag_p99_seconds": percentiles([t.sent - t.due for t in timelines], 99)["p99"],
    }


def steady_rate(timelines: Sequence[Timeline]) -> float:
    """Completions a second between the first and the last fifth of them: no ramp, no drain."""
    ended = sorted(t.ended for t in timelines if t.error is None)
    first, last = len(ended) // 5, len(ended) - 1 - len(ended) // 5
    return (last - first) / (ended[last] - ended[first])


def distinct_at_once(timelines: Sequence[Timeline], adapters: Sequence[int]) -> dict[str, float]:
    """Distinct adapters (>= 0) among the requests that are decoding: mean over time, and most.

    A request decodes from its first piece to its last.
    """
    spans = [
        (t.pieces[0], t.pieces[-1], adapter)
        for t, adapter in zip(timelines, adapters, strict=True)
        if len(t.pieces) > 1 and adapter >= 0
    ]
    weighted = list(_distinct_over_time(spans))
    seconds = sum(duration for duration, _ in weighted)
    mean = sum(duration * count for duration, count in weighted) / seconds if seconds else 0.0
    return {"mean": mean, "most": float(max((count for _, count in weighted), default=0))}


def _distinct_over_time(spans: Sequence[tuple[float, float, int]]) -> Iterator[tuple[float, int]]:
    """(duration, distinct adapters) between every two moments at which a span begins or ends."""
    changes = sorted([(a, 1, i) for a, _, i in spans] + [(b, -1, i) for _, b, i in spans])
    open_spans: dict[int, int] = {}
    for n, (moment, step, adapter) in enumerate(changes):
        open_spans[adapter] = open_spans.get(adapter, 0) + step
        if not open_spans[adapter]:
            del open_spans[adapter]
        if open_spans:
            yield changes[n + 1][0] - moment, len(open_spans)
