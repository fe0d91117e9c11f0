"""The bodies that the generation routes send: OpenAI's shapes, absent members left out."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything sent: a member that has no value is absent, not null."""


class AppliedPart(Answer, frozen=True):
    """An adapter version in a combination."""

    id: str
    version: int
    digest: str
    weight: float


class AppliedAdapter(Answer, frozen=True, kw_only=True):
    """The adapter version whose weights computed the tokens, as the engine reports it.

    A combination, or an adapter at another scale than 1, has parts, and no id of its own.
    """

    id: str | None = None
    version: int | None = None
    digest: str
    parts: list[AppliedPart] | None = None


class PromptTokensDetails(Answer, frozen=True):
    """Of the prompt's tokens, those that an earlier request had computed."""

    cached_tokens: int


class Usage(Answer, frozen=True):
    """Tokens of a request, all choices together; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenCandidate(Answer, frozen=True):
    """A token and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenCandidate, frozen=True):
    """A token of the completion, and the most probable ones at its place."""

    top_logprobs: list[TokenCandidate]


class ChatLogprobs(Answer, frozen=True):
    """Log-probabilities of a chat choice or of a piece of one."""

    content: list[ChatToken]


class ChatMessage(Answer, frozen=True):
    """The assistant's turn."""

    role: str
    content: str


class ChatDelta(Answer, frozen=True):
    """What a chunk adds to the assistant's turn."""

    role: str | None = None
    content: str | None = None


class ChatChoice(Answer, frozen=True):
    """One completion of a chat, whole (`message`) or in pieces (`delta`)."""

    index: int
    message: ChatMessage | None = None
    delta: ChatDelta | None = None
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionLogprobs(Answer, frozen=True):
    """Log-probabilities of a plain completion, one entry for each token in every list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer, frozen=True):
    """One plain completion, whole or a piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(Answer, frozen=True):
    """A whole answer, or a chunk of a streamed one."""

    id: str
    object: str
    created: int  # unix seconds
    model: str
    choices: list[ChatChoice] | list[CompletionChoice]
    adapter: AppliedAdapter | None = None
    usage: Usage | None = None


class Json(Response):
    """A JSON body from structs, dataclasses and plain values."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
