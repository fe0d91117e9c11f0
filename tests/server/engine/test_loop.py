"""The loop answers every message, survives failing steps, waits only when idle, and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.loop import REPORT_SECONDS, EngineLoop
from server.engine.plan import SampledToken, StepPlan
from server.engine.request import (
    Cancel,
    Drop,
    Dropped,
    Finished,
    Load,
    Preload,
    Sampling,
    Submit,
    TokenEvent,
)

MAX_TURNS = 400


class ListPost:
    """Gives one inbox at each turn, keeps what is sent, and how it was asked to wait."""

    def __init__(self) -> None:
        self.inboxes: list[list] = []
        self.sent: list = []
        self.waits: list[bool] = []

    def receive(self, wait: bool) -> list:
        self.waits.append(wait)
        return self.inboxes.pop(0) if self.inboxes else []

    def send(self, messages) -> None:
        self.sent.extend(messages)

    def of(self, kind: type, request_id: str | None = None) -> list:
        return [
            m
            for m in self.sent
            if isinstance(m, kind) and request_id in (None, getattr(m, "request_id", None))
        ]

    def tokens(self, request_id: str) -> list[int]:
        return [t for event in self.of(TokenEvent, request_id) for t in event.token_ids]


class ScriptedRunner:
    """The next token is the number of tokens so far; a step with a condemned request raises."""

    def __init__(self) -> None:
        self.condemned: set[str] = set()
        self.steps: list[list[str]] = []
        self.during: Callable[[], None] = lambda: None

    def run(self, plan: StepPlan) -> list[SampledToken]:
        ids = [item.sequence.request_id for item in plan.items]
        self.steps.append(ids)
        self.during()
        if self.condemned & set(ids):
            raise RuntimeError("the device is gone")
        return [SampledToken(i.sequence.num_tokens) for i in plan.items if i.samples]


class Engine:
    """A loop on a real scheduler and real memory; model, loads and post are scripted."""

    def __init__(self, simulation) -> None:
        self.parts = simulation
        self.scheduler, self.loader = simulation.scheduler, simulation.loader
        self.post, self.runner = ListPost(), ScriptedRunner()
        self.loop = EngineLoop(
            self.scheduler, self.runner, simulation.kv_cache, simulation.adapters, self.post
        )

    def turn(self, *messages) -> None:
        self.post.inboxes.append(list(messages))
        self.loop.turn()
        self.parts.check()

    def run(self) -> None:
        """Turn until nothing is left to do, finishing each load as it comes."""
        for _ in range(MAX_TURNS):
            if not self.scheduler.has_work:
                self.turn()
                return
            if self.loader.pending:
                self.loader.finish()
            self.turn()
        raise AssertionError(f"still busy after {MAX_TURNS} turns")

    def report(self) -> Load:
        return self.post.of(Load)[-1]


@pytest.fixture
def engine(simulate) -> Engine:
    return Engine(simulate())


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The loop's clock, which stands still unless a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("server.engine.loop.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def submit(request_id: str, num_prompt: int = 3, max_tokens: int = 4, adapter=None) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=tuple(range(num_prompt)),
        sampling=Sampling(max_tokens=max_tokens),
        adapter=adapter,
    )


def test_a_request_gets_its_tokens_and_then_one_end(engine):
    engine.turn(submit("a", num_prompt=3, max_tokens=4))
    engine.run()
    assert engine.post.tokens("a") == [3, 4, 5, 6]
    (finished,) = engine.post.of(Finished, "a")
    assert (finished.reason, finished.num_completion_tokens) == ("length", 4)
    about_a = [m for m in engine.post.sent if getattr(m, "request_id", None) == "a"]
    assert about_a[-1] is finished


def test_requests_of_base_and_adapters_run_side_by_side(engine, image):
    engine.turn(submit("base"), submit("one", adapter=image("x", 2)), submit("two", num_prompt=9))
    engine.run()
    assert [m.request_id for m in engine.post.of(Finished)].count("one") == 1
    digests = {m.request_id: m.adapter_digest for m in engine.post.of(Finished)}
    assert digests == {"base": None, "one": "x", "two": None}
    assert max(len(ids) for ids in engine.runner.steps) > 1


def test_a_failing_step_ends_its_own_requests_and_the_others_go_on(simulate, caplog):
    engine = Engine(simulate(max_num_seqs=2))
    engine.runner.condemned = {"bad"}
    engine.turn(submit("bad"), submit("beside"), submit("waiting"), submit("later"))
    engine.run()
    ends = {m.request_id: m for m in engine.post.of(Finished)}
    for request_id in ("bad", "beside"):
        assert (ends[request_id].reason, ends[request_id].error_code) == ("error", "internal_error")
        assert "RuntimeError: the device is gone" in ends[request_id].error
    assert {ends["waiting"].reason, ends["later"].reason} == {"length"}
    assert len(engine.post.of(Finished)) == 4
    assert "bad" in caplog.text
    assert "beside" in caplog.text


def test_a_failing_step_gives_back_pages_and_pins(engine, image):
    engine.runner.condemned = {"bad"}
    engine.turn(submit("bad", adapter=image("x", 2)))
    engine.run()
    report = engine.report()
    assert (report.num_kv_pages, report.num_running, report.num_waiting) == (0, 0, 0)
    assert [adapter.num_users for adapter in report.adapters] == [0]


def test_a_step_that_failed_leaves_the_next_ones_alone(engine):
    engine.runner.condemned = {"bad"}
    engine.turn(submit("bad"))
    engine.turn(submit("good"))
    engine.run()
    assert engine.post.tokens("good") == [3, 4, 5, 6]


def test_the_second_of_two_requests_of_one_id_is_ignored_and_the_first_goes_on(engine, caplog):
    engine.turn(submit("a"), submit("a", num_prompt=7, max_tokens=1))
    engine.turn(submit("a"))
    engine.run()
    assert engine.post.tokens("a") == [3, 4, 5, 6]
    assert len(engine.post.of(Finished, "a")) == 1
    assert "request a is live already" in caplog.text


def test_an_id_may_come_again_once_its_request_has_ended(engine):
    for _ in range(2):
        engine.turn(submit("a", max_tokens=1))
        engine.run()
    assert len(engine.post.of(Finished, "a")) == 2


def test_cancel_ends_running_and_waiting_requests_at_once(simulate):
    engine = Engine(simulate(max_num_seqs=1))
    engine.turn(submit("runs", max_tokens=30), submit("waits"))
    engine.turn(Cancel(request_id="runs"), Cancel(request_id="waits"))
    ends = {m.request_id: m.reason for m in engine.post.of(Finished)}
    assert ends == {"runs": "cancelled", "waits": "cancelled"}
    assert engine.report().num_kv_pages == 0


def test_cancelling_unknown_and_ended_requests_does_nothing(engine):
    engine.turn(Cancel(request_id="nobody"), submit("a"))
    engine.run()
    engine.turn(Cancel(request_id="a"))
    assert len(engine.post.of(Finished)) == 1


def test_submit_and_cancel_in_one_inbox_end_the_request_without_a_step(engine):
    engine.turn(submit("a"), Cancel(request_id="a"))
    assert [m.reason for m in engine.post.of(Finished)] == ["cancelled"]
    assert engine.runner.steps == []


def test_a_drop_is_answered_when_the_adapters_requests_have_ended(engine, image):
    adapter = image("x", 2)
    engine.turn(submit("a", adapter=adapter, max_tokens=3))
    engine.loader.finish()
    engine.turn(Drop(digest="x"))
    assert engine.post.of(Dropped) == []
    engine.run()
    (dropped,) = engine.post.of(Dropped)
    assert dropped == Dropped(digest="x", freed_bytes=2 * engine.parts.pool.page_bytes)
    assert engine.post.of(Finished, "a")[0].reason == "length"
    assert engine.report().num_adapter_pages == 0


def test_a_drop_with_abort_cancels_the_adapters_requests_and_no_others(engine, image):
    engine.turn(submit("a", adapter=image("x", 2), max_tokens=30), submit("b", max_tokens=6))
    engine.loader.finish()
    engine.turn()
    engine.turn(Drop(digest="x", abort=True))
    assert engine.post.of(Dropped)[0].freed_bytes > 0
    engine.run()
    assert {m.request_id: m.reason for m in engine.post.of(Finished)} == {
        "a": "cancelled",
        "b": "length",
    }


def test_dropping_what_is_not_there_frees_nothing_and_is_answered(engine):
    engine.turn(Drop(digest="x"))
    assert engine.post.of(Dropped) == [Dropped(digest="x", freed_bytes=0)]


def test_a_preload_makes_an_adapter_resident_without_a_request(engine, image, clock):
    engine.turn(Preload(adapter=image("x", 2)))
    assert [a.state for a in engine.report().adapters] == ["loading"]
    clock.now += REPORT_SECONDS
    engine.run()
    assert [(a.digest, a.state) for a in engine.report().adapters] == [("x", "resident")]
    assert engine.runner.steps == []


def test_a_preload_evicts_nothing(simulate, image, clock):
    engine = Engine(simulate(num_slots=1))
    for digest in "xy":
        engine.turn(Preload(adapter=image(digest, 2)))
        engine.run()
    clock.now += REPORT_SECONDS
    engine.turn()
    assert [a.digest for a in engine.report().adapters] == ["x"]


def test_a_load_that_fails_ends_the_requests_for_it(engine, image):
    engine.turn(submit("a", adapter=image("x", 2)), submit("b"))
    engine.loader.fail()
    engine.run()
    ends = {m.request_id: m for m in engine.post.of(Finished)}
    assert (ends["a"].reason, ends["a"].error_code) == ("error", "adapter_load_failed")
    assert ends["b"].reason == "length"


def test_waits_for_messages_only_when_there_is_no_step_to_run(engine, image):
    engine.turn()
    engine.turn(submit("a", max_tokens=3))
    engine.run()
    num_steps = len(engine.runner.steps)
    assert engine.post.waits == [True, True] + [False] * num_steps
    engine.turn()
    assert engine.post.waits[-1] is True


def test_waits_while_the_only_request_waits_for_its_adapter(engine, image):
    engine.turn(submit("a", adapter=image("x", 2)))
    engine.turn()
    assert engine.post.waits == [True, True]
    engine.loader.finish()
    engine.turn()
    assert engine.runner.steps == [["a"]]
    engine.turn()
    assert engine.post.waits[-1] is False


def test_messages_that_come_during_a_step_are_taken_before_the_next(engine):
    engine.turn(submit("a", max_tokens=9))
    engine.turn(submit("b"))
    assert engine.runner.steps[1] == ["a", "b"]


def test_reports_while_busy_at_most_every_200_ms_and_always_at_idle(engine, clock):
    engine.turn()
    first = len(engine.post.of(Load))
    assert first == 1
    engine.turn(submit("a", max_tokens=8))
    engine.turn()
    assert len(engine.post.of(Load)) == first, "too early"
    clock.now += REPORT_SECONDS
    engine.turn()
    assert len(engine.post.of(Load)) == first + 1
    assert engine.report().num_running == 1
    engine.run()
    assert len(engine.post.of(Load)) == first + 2, "the clock stands still: only the idle report"
    assert engine.report().num_running == 0


def test_a_report_counts_what_happened(engine, image):
    engine.turn(
        submit("a", num_prompt=5, max_tokens=3), submit("b", max_tokens=2, adapter=image("x", 2))
    )
    engine.run()
    report = engine.report()
    assert report.num_steps == len(engine.runner.steps)
    assert (report.num_prompt_tokens, report.num_generated_tokens) == (5 + 3, 3 + 2)
    assert (report.num_adapter_loads, report.num_adapter_evictions) == (1, 0)
    assert report.num_adapter_pages == 2
    assert (report.num_cached_pages, report.num_cached_tokens) == (2, 0)
    num_others = report.num_adapter_pages + report.num_cached_pages
    assert report.num_free_pages + num_others == engine.parts.pool.num_pages
    (adapter,) = report.adapters
    assert (adapter.digest, adapter.state, adapter.num_uses) == ("x", "resident", 1)


def test_closing_gives_up_the_loads(engine, image):
    engine.turn(Preload(adapter=image("x", 2)))
    engine.loop.close()
    assert engine.loader.pending == []


def messages_of(image) -> st.SearchStrategy:
    ids, digests = st.sampled_from("abcdef"), st.sampled_from("xyz")
    adapters = st.none() | st.builds(image, digests, st.just(2))
    return st.one_of(
        st.builds(submit, ids, st.integers(0, 50), st.integers(0, 6), adapters),
        st.builds(lambda i: Cancel(request_id=i), ids),
        st.builds(lambda d, abort: Drop(digest=d, abort=abort), digests, st.booleans()),
        st.builds(lambda d: Preload(adapter=image(d, 2)), digests),
        st.sampled_from(["finish a load", "fail a load", "fail a step"]),
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_submit_and_every_drop_is_answered_once_whatever_comes(simulate, image, data):
    engine = Engine(simulate())
    num_submitted: Counter[str] = Counter()
    num_drops: Counter[str] = Counter()
    for message in data.draw(st.lists(messages_of(image), max_size=30)):
        engine.runner.condemned = set("abcdef") if message == "fail a step" else set()
        if isinstance(message, str):
            if "load" in message and engine.loader.pending:
                getattr(engine.loader, message.split()[0])()
            engine.turn()
            continue
        if isinstance(message, Submit):
            is_live = num_submitted[message.request_id] > len(
                engine.post.of(Finished, message.request_id)
            )
            num_submitted[message.request_id] += not is_live
        if isinstance(message, Drop):
            num_drops[message.digest] += 1
        engine.turn(message)
    engine.run()
    ends = Counter(m.request_id for m in engine.post.of(Finished))
    assert ends == +num_submitted
    assert Counter(m.digest for m in engine.post.of(Dropped)) == +num_drops
