"""The text of one completion as it grows: tokens in, text and its tokens' log-probabilities out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from server.text.detokenizer import Detokenizer, TokenBytes
from server.text.stop_strings import StopStrings

Note = TypeVar("Note")


class NotedToken(NamedTuple, Generic[Note]):
    """A token whose text has been passed on."""

    token_id: int
    offset: int  # characters of the completion before the token's text
    note: Note  # what came with the token


class CompletionText(Generic[Note]):
    """Detokenizer and stop strings in a row, with the tokens kept beside their text.

    A token is given out with the first piece of text that reaches beyond its offset; tokens whose
    text a stop string cut off whole are never given out.
    """

    def __init__(self, tokenizer: TokenBytes, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._num_decoded = 0  # characters
        self._num_passed = 0  # characters
        self._waiting: deque[NotedToken[Note]] = deque()

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string ended the text; nothing follows it."""
        return self._stops.matched is not None

    def push(self, token_id: int, note: Note) -> tuple[str, list[NotedToken[Note]]]:
        """The text that is certain after this token, and the tokens that it belongs to."""
        self._waiting.append(NotedToken(token_id, self._num_decoded, note))
        decoded = self._detokenizer.push(token_id)
        self._num_decoded += len(decoded)
        passed = self._stops.push(decoded)
        self._num_passed += len(passed)
        return passed, self._reached()

    def flush(self) -> tuple[str, list[NotedToken[Note]]]:
        """The rest, once the tokens have ended without a stop string."""
        rest = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        tokens, self._waiting = list(self._waiting), deque()
        self._num_passed += len(rest)
        return rest, tokens

    def _reached(self) -> list[NotedToken[Note]]:
        reached = []
        while self._waiting and self._waiting[0].offset < self._num_passed:
            reached.append(self._waiting.popleft())
        return reached
