"""What stop strings promise, however the text is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stop_strings import StopStrings


def run(stops, pieces):
    """Everything passed on, and the stop string."""
    strings = StopStrings(stops)
    passed = "".join(strings.push(piece) for piece in pieces)
    return passed + ("" if strings.matched else strings.flush()), strings.matched


def expected(stops, text):
    """The specification: the first character at which some stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("abc", max_size=4), max_size=10),
)
def test_ends_where_the_first_stop_string_is_complete_however_the_text_is_split(stops, pieces):
    assert run(stops, pieces) == expected(stops, "".join(pieces))


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("ab", max_size=3), max_size=10),
)
def test_never_passes_on_what_may_begin_a_stop_string_nor_holds_back_more(stops, pieces):
    strings, text = StopStrings(stops), ""
    passed = ""
    for piece in pieces:
        passed += strings.push(piece)
        text += piece
        if strings.matched:
            return
        held = text[len(passed) :]
        begins = [
            n
            for n in range(len(text) + 1)
            if any(s.startswith(text[len(text) - n :]) for s in stops)
        ]
        assert len(held) == max(begins, default=0)


@pytest.mark.parametrize(
    ("stops", "pieces", "passed"),
    [
        (["STOP"], ["it ", "S", "TO", "P now"], "it "),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb"),
        (["END", "\n"], ["one EN", "D\n"], "one "),
        (["xyz"], ["xy"], "xy"),
    ],
)
def test_stop_strings_that_span_pieces_are_not_passed_on(stops, pieces, passed):
    assert run(stops, pieces)[0] == passed


def test_nothing_follows_a_match():
    strings = StopStrings(["."])
    assert strings.push("one. two") == "one"
    assert strings.matched == "."
    assert strings.push("three") == ""


def test_without_stop_strings_text_passes_through():
    strings = StopStrings([])
    assert strings.push("anything") == "anything"
    assert strings.flush() == ""
