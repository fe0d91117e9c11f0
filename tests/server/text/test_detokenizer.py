"""What the incremental detokenizer promises, over random tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

from_vocabulary = st.lists(st.integers(0, 330), max_size=40)  # and some that do not exist


class Bytes:
    """A vocabulary in which each token is one byte."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def pieces_of(tokenizer, token_ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(each) for each in token_ids] + [detokenizer.flush()]


@given(token_ids=from_vocabulary)
def test_pieces_joined_equal_the_full_decode(tokenizer, byte_level_hf, token_ids):
    full = byte_level_hf.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces_of(tokenizer, token_ids)) == full


@given(text=st.text(max_size=30))
def test_sound_text_never_shows_a_broken_character(tokenizer, text):
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count("\N{REPLACEMENT CHARACTER}") for piece in pieces) == text.count(
        "\N{REPLACEMENT CHARACTER}"
    )


@given(text=st.text(min_size=1, max_size=20))
def test_sound_text_is_whole_with_its_last_token(tokenizer, text):
    assert pieces_of(tokenizer, tokenizer.encode(text))[-1] == ""


def test_holds_a_character_back_until_its_last_byte():
    assert pieces_of(Bytes(), "€".encode()) == ["", "", "€", ""]


def test_gives_broken_bytes_out_as_soon_as_they_can_become_nothing():
    assert pieces_of(Bytes(), b"\xe2\x82a\xff") == ["", "", "\ufffda", "\ufffd", ""]


def test_an_unfinished_character_shows_at_the_end():
    assert pieces_of(Bytes(), b"a\xf0\x9f") == ["a", "", "", "\ufffd"]


def test_special_tokens_are_no_text(tokenizer, byte_level_hf):
    token_ids = [*tokenizer.encode("the"), byte_level_hf.eos_token_id, *tokenizer.encode(" cat")]
    assert "".join(pieces_of(tokenizer, token_ids)) == "the cat"


@pytest.mark.parametrize("text", ["a b", "é a🦜b", "日本 ab"])
def test_byte_fallback_tokens_continue_the_text_before_them(byte_fallback_hf, text):
    tokenizer = Tokenizer(byte_fallback_hf)
    joined = "".join(pieces_of(tokenizer, tokenizer.encode(text)))
    assert joined == " " + text
    assert byte_fallback_hf.decode(tokenizer.encode(text), skip_special_tokens=True) == text
