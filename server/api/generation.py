"""One HTTP request's completions: from prompts and parameters to pieces of text."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from server.api.addressing import Addressee
from server.api.answers import AppliedAdapter, AppliedPart, PromptTokensDetails, Usage
from server.api.connection import merged
from server.api.state import AppState
from server.engine.request import Finished, Submit, TokenEvent, TokenLogprobs
from server.errors import InternalError, RequestCancelled, error_with_code
from server.text.completion import CompletionText, NotedToken

logger = logging.getLogger(__name__)

Tokens = list[NotedToken[TokenLogprobs | None]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event added to one choice."""

    index: int
    text: str
    tokens: Tokens
    adapter: AppliedAdapter | None  # None: the base model's
    num_completion_tokens: int  # of the choice, so far
    num_cached_tokens: int  # of the prompt
    finish_reason: str | None = None


@dataclass(slots=True)
class Generation:
    """The completions of one HTTP request, one Submit each; `pieces` may be run once."""

    state: AppState
    completion_id: str
    addressee: Addressee
    submits: list[Submit]  # all choices of the first prompt, then all of the next, …
    num_choices: int  # of each prompt
    stops: Sequence[str]
    num_prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds
    started: float = field(default_factory=time.perf_counter)

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come; closing it cancels what still runs.

        The first piece of a choice comes with its first token, even if no text is certain yet.
        Raises a ServerError if a choice fails; the others are cancelled.
        """
        self.state.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        return merged([self._choice(i, submit) for i, submit in enumerate(self.submits)])

    def usage(self, last: Sequence[Piece]) -> Usage:
        """The usage, given the last piece of each choice.

        The first choice of a prompt may have it computed for the others: as cached counts what
        every choice found.
        """
        num_completion_tokens = sum(piece.num_completion_tokens for piece in last)
        firsts = range(0, len(last), self.num_choices)
        prompts = [last[first : first + self.num_choices] for first in firsts]
        num_cached = sum(min(piece.num_cached_tokens for piece in prompt) for prompt in prompts)
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_completion_tokens,
            total_tokens=self.num_prompt_tokens + num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )

    def headers(self, adapter: AppliedAdapter | None) -> dict[str, str]:
        """Headers that say what was applied; lists, in one order, of a combination's parts."""
        headers = {"x-manylora-model": _header_value(self.state.model_name)}
        if adapter is not None:
            each: Sequence[AppliedPart | AppliedAdapter] = adapter.parts or [adapter]
            headers["x-manylora-adapter"] = ", ".join(str(part.id) for part in each)
            headers["x-manylora-adapter-version"] = ", ".join(str(part.version) for part in each)
            headers["x-manylora-adapter-digest"] = adapter.digest
        if adapter is not None and adapter.parts:
            weights = ", ".join(str(part.weight) for part in adapter.parts)
            headers["x-manylora-adapter-weight"] = weights
        return headers

    async def _choice(self, index: int, submit: Submit) -> AsyncGenerator[Piece, None]:
        text = CompletionText[TokenLogprobs | None](self.state.tokenizer, self.stops)
        clock = _TokenClock(self.state, self.started)
        num_tokens = 0
        with self.state.listed(self.addressee.adapter_ids, submit.request_id):
            async with aclosing(self.state.engine.generate(submit)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        yield self._last_piece(index, event, text)
                        return
                    adapter = self._applied(event.adapter_digest)
                    clock.tick(len(event.token_ids))
                    added, tokens, num_read = _read_tokens(text, event)
                    num_tokens += num_read
                    reason = "stop" if text.has_stopped else None
                    num_cached = event.num_cached_tokens
                    yield Piece(index, added, tokens, adapter, num_tokens, num_cached, reason)
                    if text.has_stopped:
                        return
        raise InternalError("the engine ended the request without saying how: try again")

    def _last_piece(
        self, index: int, event: Finished, text: CompletionText[TokenLogprobs | None]
    ) -> Piece:
        if event.reason == "error":
            why = event.error or "the engine failed"
            raise error_with_code(event.error_code, why, event.retry_after)
        if event.reason == "cancelled":
            raise RequestCancelled(
                f"the request was cancelled: '{self.addressee.model_name}' was deleted while it ran"
            )
        has_computed = event.num_completion_tokens > 0 or event.adapter_digest is not None
        adapter = self._applied(event.adapter_digest) if has_computed else None
        rest, tokens = text.flush()
        counts = event.num_completion_tokens, event.num_cached_tokens
        return Piece(index, rest, tokens, adapter, *counts, event.reason)

    def _applied(self, digest: str | None) -> AppliedAdapter | None:
        """The adapter that the engine says it applied; InternalError if it is not the one asked."""
        image = self.addressee.image
        wanted = None if image is None else image.digest
        if digest != wanted:
            logger.error("%s: wanted adapter %s, got %s", self.completion_id, wanted, digest)
            raise InternalError(
                f"the engine applied adapter {digest} where {wanted} was asked for; the answer "
                "was withheld",
                code="adapter_mismatch",
            )
        return self.addressee.applied


class _TokenClock:
    """Observes when the tokens of one completion come."""

    def __init__(self, state: AppState, started: float) -> None:
        self._metrics = state.metrics
        self._last = started
        self._is_first = True

    def tick(self, num_tokens: int) -> None:
        now = time.perf_counter()
        if self._is_first:
            self._metrics.first_token_seconds.observe(now - self._last)
        elif num_tokens:
            self._metrics.inter_token_seconds.observe((now - self._last) / num_tokens)
        self._metrics.completion_tokens.inc(num_tokens)
        self._last, self._is_first = now, False


def _read_tokens(
    text: CompletionText[TokenLogprobs | None], event: TokenEvent
) -> tuple[str, Tokens, int]:
    """Text and tokens that an event makes certain, and how many of its tokens were read."""
    added, tokens, num_read = "", Tokens(), 0
    for i, token_id in enumerate(event.token_ids):
        note = event.logprobs[i] if event.logprobs else None
        passed, reached = text.push(token_id, note)
        added += passed
        tokens += reached
        num_read += 1
        if text.has_stopped:
            break
    return added, tokens, num_read


def _header_value(text: str) -> str:
    """`text` where HTTP headers are Latin-1: other characters as question marks."""
    return text.encode("latin-1", "replace").decode("latin-1")
