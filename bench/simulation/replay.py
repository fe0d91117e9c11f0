"""Plays a trace against the simulated engine in virtual time: an open loop, every arrival on time.

Keeps what happened to each request as the other benches do, in `Timeline`s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.replay import Timeline
from bench.simulation.engine import Setup, SimulatedEngine, StepCounts, submission
from bench.simulation.fleet import Fleet
from bench.simulation.transfers import SimulatedLoader, VirtualClock
from bench.workloads import Trace
from server.engine.request import Finished, FromEngine, ToEngine, TokenEvent


class Stalled(Exception):
    """The engine waits though nothing is left that it could wait for."""


@dataclass(frozen=True, slots=True)
class Run:
    """What happened while one trace was played."""

    trace: Trace
    timelines: list[Timeline]  # in the trace's order
    counts: StepCounts
    seconds: float  # of virtual time, to the last end
    num_loads: int
    num_evictions: int
    num_preemptions: int
    loaded_bytes: int


class Traffic:
    """The engine's post: hands over requests when they are due, notes what comes back.

    It is also what lets virtual time pass while the engine has nothing to compute.
    """

    def __init__(self, trace: Trace, setup: Setup, fleet: Fleet, clock: VirtualClock) -> None:
        self.loader: SimulatedLoader | None = None  # set once the engine is there
        self.timelines = [Timeline(due=due, sent=due) for due in trace.due_seconds.tolist()]
        self.num_open = len(trace)
        self._trace = trace
        self._setup = setup
        self._fleet = fleet
        self._clock = clock
        self._num_sent = 0

    def receive(self, wait: bool) -> list[ToEngine]:
        assert self.loader is not None
        if wait:
            self._clock.advance_to(self._next_moment())
        self.loader.deliver()
        messages: list[ToEngine] = []
        while (due := self._next_due()) is not None and due <= self._clock.now:
            messages.append(self._submission(self._num_sent))
            self.timelines[self._num_sent].sent = self._clock.now
            self._num_sent += 1
        return messages

    def send(self, messages: Sequence[FromEngine]) -> None:
        now = self._clock.now
        for message in messages:
            if isinstance(message, TokenEvent):
                self.timelines[int(message.request_id)].pieces.append(now)
            elif isinstance(message, Finished):
                timeline = self.timelines[int(message.request_id)]
                assert timeline.ended != timeline.ended, "a request ended twice"  # NaN until then
                timeline.ended = now
                timeline.num_tokens = message.num_completion_tokens
                timeline.error = message.error_code
                self.num_open -= 1

    def _submission(self, i: int) -> ToEngine:
        trace = self._trace
        image = self._fleet.image(int(trace.adapter[i]))
        return submission(self._setup, image, i, int(trace.num_prompt[i]), int(trace.num_output[i]))

    def _next_due(self) -> float | None:
        return self.timelines[self._num_sent].due if self._num_sent < len(self._trace) else None

    def _next_moment(self) -> float:
        assert self.loader is not None
        moments = [m for m in (self._next_due(), self.loader.next_end) if m is not None]
        if not moments:
            raise Stalled(f"{self.num_open} requests are open, and nothing is due or loading")
        return min(moments)


def play(
    trace: Trace,
    setup: Setup,
    fleet: Fleet,
    after_turn: Callable[[SimulatedEngine], None] | None = None,
) -> Run:
    """Play the whole trace, to the last request's end. Equal arguments give equal runs.

    Raises Stalled where a request is never ended.
    """
    clock = VirtualClock()
    traffic = Traffic(trace, setup, fleet, clock)
    engine = SimulatedEngine(setup, fleet, clock, traffic)
    traffic.loader = engine.loader
    while traffic.num_open:
        engine.turn()
        if after_turn is not None:
            after_turn(engine)
    return Run(
        trace=trace,
        timelines=traffic.timelines,
        counts=engine.runner.counts,
        seconds=clock.now,
        num_loads=engine.adapters.num_loads,
        num_evictions=engine.adapters.num_evictions,
        num_preemptions=engine.scheduler.num_preemptions,
        loaded_bytes=engine.loader.num_bytes,
    )
