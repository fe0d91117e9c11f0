"""The bound on bytes a second holds in every window, by a clock that the test moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.memory.byte_rate import BURST_SECONDS, ByteRate


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_piece_waits_until_those_before_it_are_paid_for():
    clock = Clock()
    rate = ByteRate(1000, clock=clock)
    assert [rate.reserve(500) for _ in range(3)] == [0.0, 0.5, 1.0]
    clock.now = 1.25
    assert rate.reserve(500) == pytest.approx(0.25)


def test_a_long_pause_allows_a_burst_and_no_more():
    clock = Clock()
    rate = ByteRate(1000, clock=clock)
    clock.now = 100.0
    assert rate.reserve(500) == 0.0
    assert rate.reserve(500) == pytest.approx(0.5 - BURST_SECONDS)


@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(0, 0.3)), max_size=60),
    st.integers(0, 59),
)
def test_no_window_has_more_than_its_share_and_one_piece(pieces, first):
    clock = Clock()
    rate = ByteRate(1000, clock=clock)
    moved = []
    for num_bytes, pause in pieces:
        clock.now += pause
        moved.append((clock.now + rate.reserve(num_bytes), num_bytes))
    window = moved[first:]
    if window:
        seconds = window[-1][0] - window[0][0]
        largest = max(num_bytes for num_bytes, _ in pieces)
        assert sum(n for _, n in window) <= 1000 * (seconds + BURST_SECONDS) + largest + 1e-6


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_refuses_a_rate_that_moves_nothing(rate):
    with pytest.raises(ValueError, match="move nothing"):
        ByteRate(rate)
