"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.api.answers import ChatLogprobs, ChatToken, CompletionLogprobs, TokenCandidate
from server.engine.request import TokenLogprobs
from server.errors import InternalError
from server.text.completion import NotedToken
from server.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's value."""

Tokens = Sequence[NotedToken[TokenLogprobs | None]]


def chat_logprobs(tokenizer: Tokenizer, tokens: Tokens) -> ChatLogprobs:
    """The tokens of a chat piece; every one was asked for with log-probabilities."""
    content = []
    for token in tokens:
        note = _note(token)
        chosen = _candidate(tokenizer, token.token_id, note.chosen)
        top = [
            _candidate(tokenizer, each, logprob)
            for each, logprob in zip(note.top_ids, note.top_logprobs, strict=True)
        ]
        content.append(
            ChatToken(
                token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(tokenizer: Tokenizer, tokens: Tokens) -> CompletionLogprobs:
    """The tokens of a piece of a plain completion; offsets count from the completion's start."""
    notes = [_note(token) for token in tokens]
    top = [
        {
            tokenizer.token_text(each): _finite(logprob)
            for each, logprob in zip(note.top_ids, note.top_logprobs, strict=True)
        }
        for note in notes
    ]
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(token.token_id) for token in tokens],
        token_logprobs=[_finite(note.chosen) for note in notes],
        top_logprobs=top,
        text_offset=[token.offset for token in tokens],
    )


def _candidate(tokenizer: Tokenizer, token_id: int, logprob: float) -> TokenCandidate:
    return TokenCandidate(
        token=tokenizer.token_text(token_id),
        logprob=_finite(logprob),
        bytes=list(tokenizer.token_bytes(token_id)),
    )


def _note(token: NotedToken[TokenLogprobs | None]) -> TokenLogprobs:
    if token.note is None:
        raise InternalError("the engine left out log-probabilities that were asked for: try again")
    return token.note


def _finite(logprob: float) -> float:
    if math.isnan(logprob):
        raise InternalError("the model gave a log-probability that is no number: try again")
    return max(logprob, LOWEST_LOGPROB)
