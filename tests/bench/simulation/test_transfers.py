"""Loads take the link's time, one after another, and end when virtual time says so."""

from __future__ import annotations

import pytest

from bench.simulation.transfers import SimulatedLoader, VirtualClock
from server.memory.image_loader import LoadCancelled


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def loader(fleet, make_machine, clock):
    return SimulatedLoader(fleet, make_machine(10), clock, num_entries=7, stride=16)


def test_time_goes_forward_only(clock):
    clock.advance(2.0)
    clock.advance_to(1.0)
    assert clock() == clock.now == 2.0
    clock.advance_to(3.5)
    assert clock() == 3.5


def test_two_loads_share_the_link_one_after_another(fleet, loader, clock):
    """The toy link moves 75 MB/s, and each load takes 10 ms more."""
    sizes = [fleet.kind(fleet.image(i)).num_bytes for i in (0, 1)]
    ended = []
    for i in (0, 1):
        pages = range(loader.measure(fleet.image(i)).num_pages)
        loader.start(fleet.image(i), pages, lambda table, i=i: ended.append(i))
    ends = [sizes[0] / 75e6 + 1e-2, sum(sizes) / 75e6 + 1e-2]
    assert loader.next_end == pytest.approx(ends[0])
    clock.advance(0.999 * ends[0])
    loader.deliver()
    assert ended == []
    clock.advance_to(loader.next_end)
    loader.deliver()
    assert ended == [0]
    assert loader.next_end == pytest.approx(ends[1])
    clock.advance_to(loader.next_end)
    loader.deliver()
    assert (ended, loader.next_end, loader.num_bytes) == ([0, 1], None, sum(sizes))


def test_a_load_begins_when_it_is_asked_for_on_an_idle_link(fleet, loader, clock):
    clock.advance(5.0)
    loader.start(fleet.image(0), range(9), lambda table: None)
    assert loader.next_end == pytest.approx(5.01 + fleet.kind(fleet.image(0)).num_bytes / 75e6)


def test_an_image_has_a_row_in_each_of_its_pages(fleet, loader, clock):
    tables = []
    size = loader.measure(fleet.image(1))
    loader.start(fleet.image(1), range(size.num_pages), tables.append)
    clock.advance(1.0)
    loader.deliver()
    assert size.num_rows == size.num_pages
    assert (tables[0].row_offset // 16).tolist() == list(range(size.num_pages))
    assert tables[0].row_ptr.tolist() == [0] + [size.num_rows] * 7


def test_a_cancelled_load_ends_at_once_as_cancelled(fleet, loader):
    outcomes = []
    loader.start(fleet.image(0), range(9), outcomes.append)
    loader.cancel("somebody-else")
    assert outcomes == []
    loader.cancel(fleet.image(0).digest)
    assert [type(outcome) for outcome in outcomes] == [LoadCancelled]
    assert loader.next_end is None


def test_nothing_is_finished_after_the_close(fleet, loader, clock):
    outcomes = []
    loader.start(fleet.image(0), range(9), outcomes.append)
    loader.close()
    clock.advance(10.0)
    loader.deliver()
    assert outcomes == []
