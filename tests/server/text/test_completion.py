"""What a growing completion promises: its tokens come with their text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.text.completion import CompletionText


class Bytes:
    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def run(stops, raw):
    """Pieces as (text, token ids), the flush last unless a stop string ended the text."""
    text = CompletionText[str](Bytes(), stops)
    pieces = []
    for byte in raw:
        pieces.append(text.push(byte, "note"))
        if text.has_stopped:
            return pieces
    return [*pieces, text.flush()]


def test_tokens_wait_for_their_character_and_come_with_it():
    pieces = run([], "a€".encode())
    assert [(added, [t.offset for t in tokens]) for added, tokens in pieces] == [
        ("a", [0]),
        ("", []),
        ("", []),
        ("€", [1, 1, 1]),
        ("", []),
    ]


def test_tokens_that_a_stop_string_cut_off_are_not_given_out():
    pieces = run(["END"], b"ab ENDING")
    assert "".join(added for added, _ in pieces) == "ab "
    assert [token.token_id for _, tokens in pieces for token in tokens] == list(b"ab ")


@given(raw=st.binary(max_size=20), stop=st.sampled_from([(), ("a",), ("ab", "\x00")]))
def test_without_a_stop_every_token_is_given_out_once_in_order(raw, stop):
    pieces = run(stop, raw)
    given_out = [token.token_id for _, tokens in pieces for token in tokens]
    text = raw.decode(errors="replace")
    if not any(each in text for each in stop):
        assert given_out == list(raw)
        assert "".join(added for added, _ in pieces) == text
    assert given_out == list(raw)[: len(given_out)]
