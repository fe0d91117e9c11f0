"""Traffic against a scripted engine: what counts, what fails, which answers are no measurement."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest

from bench import adapter_traffic
from bench.adapter_traffic import TOLERANCE, AdapterTraffic, after_warm_up
from bench.replay import Timeline
from bench.workloads import Trace
from server.engine.request import (
    AdapterImage,
    Load,
    ResidentAdapter,
    TokenEvent,
    TokenLogprobs,
)

SECONDS_PER_TOKEN = 0.1
LOAD_SECONDS = 2.0


class ScriptedSession:
    """Has room for one adapter, whose load takes 2 s; tokens come every 100 ms."""

    def __init__(
        self,
        *,
        answer_of=lambda digest, num_others: (ord(digest), -1.0),
        refused=(),
        second_best=None,
    ):
        self.spec = SimpleNamespace(config=SimpleNamespace(vocab_size=100))
        self.engine = SimpleNamespace(load=None)
        self.asked = []
        self.dropped = []
        self._answer_of = answer_of
        self._refused = refused
        self._second_best = second_best or {}
        self._num_open = self._num_loads = 0
        self._resident = None
        self._report()

    def _report(self):
        adapters = ()
        if self._resident is not None:
            adapters = (ResidentAdapter(digest=self._resident, state="resident"),)
        counts = dict.fromkeys(Load.__struct_fields__, 0)
        self.engine.load = Load(
            **counts | {"num_adapter_loads": self._num_loads, "adapters": adapters}
        )

    async def answer(self, prompt, image, num_tokens, arrived=lambda: None, num_logprobs=None):
        self.asked.append(image.digest)
        if image.digest in self._refused:
            raise RuntimeError("a request ended by error: refused")
        self._num_open += 1
        if self._resident != image.digest:
            self._resident = image.digest
            await asyncio.sleep(LOAD_SECONDS)
            self._num_loads += 1
            self._report()
        events = []
        for _ in range(num_tokens):
            await asyncio.sleep(SECONDS_PER_TOKEN)
            arrived()
            token, chosen = self._answer_of(image.digest, self._num_open - 1)
            second, its_logprob = self._second_best.get(image.digest, (0, -9.0))
            best = TokenLogprobs(
                chosen=chosen, top_ids=(token, second), top_logprobs=(chosen, its_logprob)
            )
            events.append(TokenEvent(request_id="", token_ids=(token,), logprobs=(best,)))
        self._num_open -= 1
        return events

    async def make_resident(self, images):
        for image in images:
            await self.answer([1], image, 1)

    async def drop_all(self, images):
        self.dropped += [image.digest for image in images]


FLEET = SimpleNamespace(images=[AdapterImage(digest, f"/{digest}") for digest in "abcd"])


def traffic(session):
    return AdapterTraffic(session, FLEET)


def trace(*adapters, gap=10.0):
    n = len(adapters)
    ones = np.ones(n, np.int64)
    return Trace(gap * np.arange(1, n + 1), np.array(adapters), 4 * ones, 3 * ones)


def test_requests_of_the_warm_up_load_and_do_not_count(virtual_run):
    found = virtual_run(traffic(ScriptedSession()).play(trace(0, 1, 1, 1), num_warm=2))
    assert found["num_requests"] == 2
    assert found["first_token_p99_seconds"] == pytest.approx(SECONDS_PER_TOKEN)
    assert found["seconds"] == pytest.approx(20.3)  # since the second request was due
    assert (found["loads_per_second"], found["hit_share"]) == (0, 1)


def test_loads_and_residents_are_those_that_the_engine_reports(virtual_run):
    found = virtual_run(traffic(ScriptedSession()).play(trace(0, 1, 2, 2), num_warm=1))
    assert found["loads_per_second"] * found["seconds"] == pytest.approx(2)
    assert found["hit_share"] == pytest.approx(1 / 3)
    assert (found["resident"], found["distinct_requested"]) == (1, 2)
    assert found["distinct_at_once"] == 1


def test_a_request_that_is_refused_counts_as_failed_and_the_others_go_on(virtual_run):
    session = ScriptedSession(refused="b")
    found = virtual_run(traffic(session).play(trace(0, 1, 0), num_warm=0))
    assert (found["num_failed"], found["num_requests"]) == (1, 3)
    assert session.asked == ["a", "b", "a"]


def test_only_the_adapters_of_the_next_trace_are_resident_and_their_files_on_disk_alone(
    virtual_run, monkeypatch
):
    forgotten = []
    monkeypatch.setattr(adapter_traffic, "forget_cached", lambda i: forgotten.append(i.digest))

    async def main():
        session = ScriptedSession()
        both = traffic(session)
        await both.have_resident(trace(2, 0, 2))
        await both.have_resident(trace(1))
        return session

    session = virtual_run(main())
    assert session.asked == forgotten == ["a", "c", "b"]
    assert session.dropped == ["a", "c"]


def test_saturation_is_what_the_clients_get_answered(virtual_run):
    """Two clients, 0.3 s an answer."""
    found = virtual_run(traffic(ScriptedSession()).saturation(trace(*[0] * 40), 2))
    assert found == pytest.approx(2 / 0.3, rel=0.1)


def test_answers_that_are_the_same_in_a_crowd_pass_the_check(virtual_run):
    found = virtual_run(traffic(ScriptedSession()).check(4))
    assert found == {"num_adapters": 4, "distance_to_own": 0, "distance_to_another": math.inf}


def test_adapters_that_answer_alike_are_no_measurement(virtual_run):
    session = ScriptedSession(answer_of=lambda digest, num_others: (5, -1.0))
    with pytest.raises(RuntimeError, match=r"0\.000 from its own alone and 0\.000 from another's"):
        virtual_run(traffic(session).check(4))


def test_an_answer_in_the_crowd_by_another_adapter_is_noticed(virtual_run):
    """Adapters have one favourite token each, and its log-probability is their own."""

    def answer_of(digest, num_others):
        return 5, -1.0 - 0.1 * ord("a" if num_others else digest)

    with pytest.raises(RuntimeError, match=r"adapter b .* 0\.100 from its own .* 0\.000 from"):
        virtual_run(traffic(ScriptedSession(answer_of=answer_of)).check(4))


@pytest.mark.parametrize(
    ("token", "chosen", "distance"),
    [(7, -1.1, 0.0), (7, -1.2, 0.1), (7, -1.4, None), (8, -1.0, None)],
)
def test_an_answer_may_part_from_the_one_alone_at_a_token_that_was_as_good(
    virtual_run, token, chosen, distance
):
    """Alone, the second best token of a is 7, at -1.1; in the crowd it may be the best."""

    def answer_of(digest, num_others):
        return (token, chosen) if num_others and digest == "a" else (ord(digest), -1.0)

    session = ScriptedSession(answer_of=answer_of, second_best={"a": (7, -1.1)})
    checked = traffic(session).check(2)
    if distance is None:
        with pytest.raises(RuntimeError, match=rf"adapter a among others .* may be {TOLERANCE}"):
            virtual_run(checked)
    else:
        assert virtual_run(checked)["distance_to_own"] == pytest.approx(distance)


def test_seconds_after_the_warm_up_count_from_its_last_request():
    timelines = [Timeline(due, due + 0.1, [due + 1, due + 2], due + 2) for due in (1.0, 3.0, 4.5)]
    (kept,) = after_warm_up(timelines, 2)
    assert (kept.due, kept.sent, kept.pieces, kept.ended) == (
        1.5, pytest.approx(1.6), [2.5, 3.5], 3.5,
    )  # fmt: skip
    assert after_warm_up(timelines, 0) == timelines
