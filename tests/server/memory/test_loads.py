"""Loads in progress: one for each digest, wanted and given up in any order, never lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.memory.loads import Loads
from server.memory.residency import AdapterImage

TIMEOUT = 10.0


def image_of(digest: str, num_pages: int = 2) -> AdapterImage:
    return AdapterImage(digest=digest, path=str(4 * num_pages))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loads(loader, clock):
    loads = Loads(loader, timeout_seconds=TIMEOUT, on_ended=lambda: None, clock=clock)
    loads.start(image_of("a"), [3, 4], is_preload=False)
    return loads


def test_a_cancelled_load_keeps_its_pages_until_the_loader_has_let_go(loads, loader):
    loads.cancel("a")
    assert loader.cancelled == ["a"]
    assert loads.take_ended() == []
    loads.check({"a": [3, 4]})
    loader.stop("a")
    assert loads.take_ended() == [("a", None)]
    assert len(loads) == 0
    assert loads.num_cancelled == 1


def test_a_load_that_is_wanted_again_while_it_stops_is_begun_anew(loads, loader):
    loads.cancel("a")
    assert loads.join("a", is_preload=False) is None
    loader.stop("a")
    assert loads.take_ended() == [], "the ones that wait are told of the second load"
    assert loader.pending["a"][0] == (3, 4), "in the same pages"
    loader.finish("a")
    ((digest, table),) = loads.take_ended()
    assert (digest, table.row_offset.shape) == ("a", (8,))
    assert loads.num_cancelled == 0


def test_a_cancel_that_comes_too_late_changes_nothing(loads, loader):
    loader.finish("a")
    loads.cancel("a")
    ((digest, table),) = loads.take_ended()
    assert digest == "a"
    assert table is not None


def test_a_preload_is_not_cancelled_by_requests_that_leave(loads, loader):
    loads.join("a", is_preload=True)
    loads.cancel("a")
    loads.cancel("unknown")
    assert loader.cancelled == []


def test_a_failure_of_a_load_that_was_given_up_is_nobodys(loads, loader):
    loads.cancel("a")
    loader.fail("a")
    assert loads.take_ended() == [("a", None)]


def test_an_overdue_load_is_told_once_and_ends_when_its_thread_lets_go(loads, loader, clock):
    clock.now = TIMEOUT - 0.1
    assert loads.take_overdue() == []
    clock.now = TIMEOUT
    ((digest, message),) = loads.take_overdue()
    assert digest == "a"
    assert "longer than 10 s" in message
    assert "load_timeout_seconds" in message
    assert loader.cancelled == ["a"]
    assert loads.take_overdue() == []
    assert loads.join("a", is_preload=False) == message, "who comes later does not wait in vain"
    loads.check({"a": [3, 4]})
    loader.stop("a")
    assert loads.take_ended() == [("a", None)]
    loads.start(image_of("a"), [1, 2], is_preload=False)
    assert loads.take_overdue() == [], "a new load has its own time"


def test_an_overdue_load_that_ends_well_after_all_is_of_use(loads, loader, clock):
    clock.now = TIMEOUT
    loads.take_overdue()
    loader.finish("a")
    ((_, table),) = loads.take_ended()
    assert table is not None


def test_a_load_that_is_begun_anew_has_its_time_anew(loads, loader, clock):
    clock.now = TIMEOUT - 1
    loads.cancel("a")
    loads.join("a", is_preload=False)
    loader.stop("a")
    loads.take_ended()
    clock.now = TIMEOUT + 1
    assert loads.take_overdue() == []
    clock.now = 2 * TIMEOUT
    assert len(loads.take_overdue()) == 1


def test_a_slow_load_leaves_the_others_their_own_time_and_end(loads, loader, clock):
    clock.now = TIMEOUT / 2
    loads.start(image_of("b"), [5], is_preload=False)
    clock.now = TIMEOUT
    assert [digest for digest, _ in loads.take_overdue()] == ["a"]
    loader.finish("b")
    assert [digest for digest, _ in loads.take_ended()] == ["b"]


SIZES = {"a": 1, "b": 2, "c": 3, "d": 5}
names = st.sampled_from(sorted(SIZES))
operation = st.one_of(
    st.tuples(st.sampled_from(["request", "preload", "cancel", "drop"]), names),
    st.tuples(st.sampled_from(["finish", "fail", "stop"]), st.integers(0, 3)),
    st.tuples(st.just("pass"), st.sampled_from([1.0, TIMEOUT])),
    st.tuples(st.just("poll"), st.none()),
)


@given(st.lists(operation, max_size=80))
def test_pages_are_freed_only_when_nothing_can_write_them_and_all_come_back(
    hand_driven, operations
):
    clock = Clock()
    adapters, pool, loader = hand_driven(load_timeout_seconds=TIMEOUT, clock=clock)
    waiting: set[str] = set()
    for kind, value in operations:
        apply(adapters, loader, clock, waiting, kind, value)
        adapters.check()
        for pages, _ in loader.pending.values():
            assert not any(pool.is_free(page) for page in pages), "a thread may still write it"
    for digest in list(loader.pending):
        loader.stop(digest)
    for _ in range(2):  # one that was wanted again has begun anew
        waiting -= {result.digest for result in adapters.poll()}
        for digest in list(loader.pending):
            loader.finish(digest)
    waiting -= {result.digest for result in adapters.poll()}
    assert waiting == set(), "whoever waits is told"
    for digest in SIZES:
        adapters.drop(digest)
    adapters.check()
    assert pool.num_free == pool.num_pages


def apply(adapters, loader, clock, waiting, kind, value) -> None:
    """One operation; `waiting` are the digests whose result has to come."""
    if kind in ("request", "preload"):
        image = image_of(value, SIZES[value])
        accepted = adapters.request(image, is_preload=kind == "preload")
        if accepted and not adapters.is_resident(value):
            waiting.add(value)
    elif kind == "cancel":
        if adapters.is_loading(value) and not adapters._loads._loads[value].is_preload:
            waiting.discard(value)
        adapters.cancel(value)
    elif kind == "drop":
        adapters.drop(value)
    elif kind == "pass":
        clock.now += value
    elif kind == "poll":
        waiting -= {result.digest for result in adapters.poll()}
    elif loader.pending:
        digest = sorted(loader.pending)[value % len(loader.pending)]
        if kind != "stop":
            getattr(loader, kind)(digest)
        elif digest in loader.cancelled:
            loader.cancelled.remove(digest)
            loader.stop(digest)
