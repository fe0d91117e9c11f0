"""Traffic for stored adapters on one engine: its answers checked, its saturation, its figures."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from bench.engine_session import EngineSession
from bench.replay import (
    RequestFailed,
    Timeline,
    closed_loop,
    distinct_at_once,
    figures,
    open_loop,
    steady_rate,
)
from bench.stored_images import Fleet, forget_cached
from bench.workloads import RandomPrompts, Trace
from server.engine.request import AdapterImage, Load, TokenEvent, TokenLogprobs

REPORT_SECONDS = 0.3
"""After which the engine's report has taken in all that happened."""

NUM_CHECK_PROMPT, NUM_CHECK_OUTPUT = 16, 12
NUM_BEST = 5
TOLERANCE = 0.25
"""Difference of one log-probability that bf16 may make between two batches."""

COUNTERS = {
    "loads_per_second": "num_adapter_loads",
    "evictions_per_second": "num_adapter_evictions",
    "preemptions_per_second": "num_preemptions",
    "steps_per_second": "num_steps",
}
"""Figures, and the counters of the engine's report that they are the growth of."""


class AdapterTraffic:
    """Adapter i of a trace is fleet.images[i]."""

    def __init__(self, session: EngineSession, fleet: Fleet) -> None:
        self.session = session
        self._images = fleet.images
        self._prompts = RandomPrompts(session.spec.config.vocab_size)
        self._resident: list[AdapterImage] = []  # by `have_resident`

    async def have_resident(self, trace: Trace) -> None:
        """Have the trace's adapters on the device, and none of those before.

        Their files are not in the system's page cache afterwards: another engine reads the disk.
        """
        await self.session.drop_all(self._resident)
        self._resident = [self._images[i] for i in np.unique(trace.adapter).tolist()]
        await self.session.make_resident(self._resident)
        for image in self._resident:
            forget_cached(image)

    async def saturation(self, trace: Trace, num_clients: int) -> float:
        """Completed requests a second when clients send as soon as they are answered."""
        play = self._prepare(trace, num_warm=0)
        return steady_rate(await closed_loop(len(trace), num_clients, play.ask))

    async def play(self, trace: Trace, num_warm: int) -> dict[str, float]:
        """The figures of one open-loop run, of the requests after the first num_warm.

        resident: adapters on the device, and hit_share: requests that found theirs there; both at
        arrivals, by the engine's last report.
        """
        play = self._prepare(trace, num_warm)
        timelines = await open_loop(trace.due_seconds, play.ask)
        await asyncio.sleep(REPORT_SECONDS)
        before, after = play.before, self.session.engine.load
        assert before is not None
        assert after is not None
        kept, adapters = after_warm_up(timelines, num_warm), trace.adapter[num_warm:]
        found = figures(kept)
        return {
            **found,
            "distinct_requested": float(len(np.unique(adapters))),
            "distinct_at_once": distinct_at_once(kept, adapters.tolist())["mean"],
            "resident": statistics.fmean(play.num_resident),
            "hit_share": statistics.fmean(play.hits),
            **{
                name: (getattr(after, counter) - getattr(before, counter)) / found["seconds"]
                for name, counter in COUNTERS.items()
            },
        }

    async def check(self, num_adapters: int) -> dict[str, float]:
        """Answers of adapters in one crowd beside each one's answer alone, to the same prompt.

        Raises RuntimeError where an answer in the crowd is not that of its adapter alone, or is as
        near to another's.
        """
        chosen = np.linspace(0, len(self._images) - 1, num_adapters).round().astype(int)
        images = [self._images[i] for i in np.unique(chosen).tolist()]
        (prompt,) = self._prompts.draw([NUM_CHECK_PROMPT])

        async def answer(image: AdapterImage) -> list[TokenEvent]:
            return await self.session.answer(prompt, image, NUM_CHECK_OUTPUT, num_logprobs=NUM_BEST)

        alone = [await answer(image) for image in images]
        crowd = await asyncio.gather(*(answer(image) for image in images))
        to_own, to_others = [], []
        for i, (image, events) in enumerate(zip(images, crowd, strict=True)):
            distances = [_distance(each, events) for each in alone]
            to_own.append(distances.pop(i))
            to_others.append(min(distances))
            if to_own[i] > TOLERANCE or to_own[i] >= to_others[i]:
                raise RuntimeError(
                    f"adapter {image.digest} among others has log-probabilities that are "
                    f"{to_own[i]:.3f} from its own alone and {to_others[i]:.3f} from another's: "
                    f"the first may be {TOLERANCE}, and less than the second"
                )
        return {
            "num_adapters": len(images),
            "distance_to_own": max(to_own),
            "distance_to_another": min(to_others),
        }

    def _prepare(self, trace: Trace, num_warm: int) -> _Play:
        texts = self._prompts.draw(trace.num_prompt)
        images = [self._images[i] for i in trace.adapter.tolist()]
        return _Play(self.session, texts, images, trace.num_output.tolist(), num_warm)


class _Play:
    """Sends a trace's requests, and notes what the engine reports as they arrive."""

    def __init__(
        self,
        session: EngineSession,
        texts: Sequence[Sequence[int]],
        images: Sequence[AdapterImage],
        num_output: Sequence[int],
        num_warm: int,
    ) -> None:
        self.before: Load | None = None  # the report when warm-up ended
        self.num_resident: list[int] = []
        self.hits: list[bool] = []
        self._session = session
        self._texts = texts
        self._images = images
        self._num_output = num_output
        self._num_warm = num_warm

    async def ask(self, i: int, arrived: Callable[[], None]) -> int:
        self._note(i)
        try:
            events = await self._session.answer(
                self._texts[i], self._images[i], self._num_output[i], arrived
            )
        except RuntimeError as error:
            raise RequestFailed(str(error)) from error
        return len(_tokens(events))

    def _note(self, i: int) -> None:
        load = self._session.engine.load
        if load is None or i < self._num_warm:
            return
        self.before = self.before or load
        resident = {a.digest for a in load.adapters if a.state == "resident"}
        self.num_resident.append(len(resident))
        self.hits.append(self._images[i].digest in resident)


def after_warm_up(timelines: Sequence[Timeline], num_warm: int) -> list[Timeline]:
    """Those after the first num_warm, seconds counted from when the last of these was due."""
    start = timelines[num_warm - 1].due if num_warm else 0.0
    return [
        dataclasses.replace(
            t,
            due=t.due - start,
            sent=t.sent - start,
            pieces=[piece - start for piece in t.pieces],
            ended=t.ended - start,
        )
        for t in timelines[num_warm:]
    ]


def _tokens(events: Sequence[TokenEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def _distance(alone: Sequence[TokenEvent], crowd: Sequence[TokenEvent]) -> float:
    """Largest difference of log-probabilities, of the tokens of `crowd` up to where both part.

    Infinite where they part at a token that is none of the best alone.
    """
    largest = 0.0
    for token, other, expected, got in zip(
        _tokens(alone), _tokens(crowd), _logprobs(alone), _logprobs(crowd), strict=True
    ):
        best = dict(zip(expected.top_ids, expected.top_logprobs, strict=True))
        largest = max(largest, abs(best.get(other, np.inf) - got.chosen))
        if other != token:
            break
    return largest


def _logprobs(events: Sequence[TokenEvent]) -> list[TokenLogprobs]:
    return [entry for event in events for entry in event.logprobs or ()]
