"""A rival that answers something else is refused before it is timed."""

import json

import pytest

from bench.rivals import expected
from bench.rivals.environments import RivalError
from bench.rivals.expected import Expected, check_answers, read_expected

ENTRIES = [Expected(0, [1], "L", 0.9), Expected(1, [2], " of", 0.8), Expected(None, [3], "'s", 0.7)]


def test_expected_answers_pass():
    check_answers("rival", ENTRIES, ["L", "of", " 's"])


def test_a_wrong_answer_is_told_with_what_it_should_be():
    with pytest.raises(RivalError, match=r"rival .* wrong: adapter 1 answers 'x' instead of ' of'"):
        check_answers("rival", ENTRIES, ["L", "x", "'s"])
    with pytest.raises(RivalError, match=r"the base model answers 'L' instead of"):
        check_answers("rival", ENTRIES, ["L", " of", "L"])


def test_only_clear_answers_of_adapters_that_are_loaded_are_asked(tmp_path, monkeypatch):
    path = tmp_path / "expected.json"
    unclear = Expected(0, [4], "a", 0.1)
    path.write_text(json.dumps([vars(entry) for entry in [*ENTRIES, unclear]]))
    monkeypatch.setattr(expected, "EXPECTED", path)
    assert [entry.adapter for entry in read_expected(1)] == [0, None]
    assert [entry.adapter for entry in read_expected(0)] == [None]
