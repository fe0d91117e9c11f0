"""Loads that nobody waits for end early, those that take too long fail their own requests."""

from __future__ import annotations

import pytest


@pytest.fixture
def loading(simulate, image):
    """An adapter `a` of 3 pages that one request, `first`, waits for."""
    sim = simulate()
    sim.submit("first", adapter=image("a", 3))
    sim.step()
    assert sim.adapters.num_loading == 1
    return sim


def test_a_load_is_cancelled_when_its_last_request_leaves(loading, image):
    loading.submit("second", adapter=image("a", 3))
    loading.cancel("first")
    assert loading.loader.cancelled == set()
    loading.cancel("second")
    assert loading.loader.cancelled == {"a"}
    assert loading.pool.num_free == 9, "a thread may still write its pages"
    loading.loader.finish()
    loading.step()
    assert loading.pool.num_free == 12
    assert loading.adapters.num_cancelled_loads == 1
    assert not loading.scheduler.has_work


def test_a_request_that_comes_while_the_load_stops_is_served_by_a_second_load(loading, image):
    loading.cancel("first")
    loading.submit("late", adapter=image("a", 3))
    loading.step()
    loading.loader.finish()  # which stops it, as it was asked to
    loading.step()
    assert len(loading.loader.pending) == 1
    loading.run()
    assert loading.finished["late"].reason == "length"
    assert loading.adapters.num_loads == 1


def test_a_load_that_was_asked_for_ahead_goes_on_without_requests(simulate, image):
    sim = simulate()
    sim.adapters.request(image("a", 3), is_preload=True)
    sim.submit("r", adapter=image("a", 3))
    sim.step()
    sim.cancel("r")
    assert sim.loader.cancelled == set()
    sim.loader.finish()
    sim.step()
    assert sim.adapters.is_resident("a")


def test_requests_for_the_base_and_for_residents_cancel_nothing(loading, image):
    loading.submit("base", num_prompt=30)
    loading.submit("other", adapter=image("b", 1))
    loading.cancel("base")
    loading.cancel("other")
    assert loading.loader.cancelled == set()
    loading.run()
    assert loading.finished["first"].reason == "length"


def test_an_aborting_drop_of_a_loading_adapter_ends_its_load(loading):
    loading.drop("a", abort=True)
    assert loading.loader.cancelled == {"a"}
    assert loading.dropped == []
    loading.loader.finish()
    loading.step()
    assert [answer.freed_bytes for answer in loading.dropped] == [0]
    assert loading.pool.num_free == loading.pool.num_pages


def test_a_load_that_takes_too_long_fails_its_requests_and_later_ones_and_no_others(
    loading, image, monkeypatch
):
    loads = loading.adapters._loads
    loading.submit("base", max_tokens=9)
    monkeypatch.setattr(loads, "_clock", lambda: 1e12)
    loading.step()
    end = loading.finished["first"]
    assert (end.reason, end.error_code) == ("error", "adapter_load_failed")
    assert "takes longer than 60 s" in str(end.error)
    assert loading.adapters.num_loading == 1, "its thread has not let go of its pages"
    loading.submit("later", adapter=image("a", 3))
    loading.step()
    loading.step()
    assert loading.finished["later"].error_code == "adapter_load_failed"
    monkeypatch.setattr(loads, "_clock", lambda: 0.0)
    loading.loader.finish()
    loading.submit("again", adapter=image("a", 3))
    loading.run()
    assert loading.finished["base"].reason == loading.finished["again"].reason == "length"
