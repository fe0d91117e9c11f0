"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from server.api.addressing import resolve
from server.api.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from server.api.body import read_body
from server.api.generation import Generation, Piece
from server.api.logprobs import completion_logprobs
from server.api.responding import respond
from server.api.state import state_of
from server.api.submission import Length, new_generation
from server.api.wire import CompletionBody
from server.errors import InvalidRequest
from server.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of this route."""

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one or several prompts with the base model or an adapter."""
    state = state_of(request)
    body = await read_body(request, CompletionBody)
    state.running_context()
    addressee = await resolve(state, body)
    prompts = await run_in_threadpool(_token_ids, state.tokenizer, body.prompt)
    length = Length(body.max_tokens, "max_tokens", DEFAULT_MAX_TOKENS)
    generation = new_generation(state, "cmpl", body, addressee, prompts, length, body.logprobs)
    shape = CompletionShape(generation, has_logprobs=body.logprobs is not None)
    return await respond(
        request, generation, shape, stream=bool(body.stream), usage=body.includes_usage
    )


class CompletionShape:
    """Pieces as plain completions and their chunks."""

    def __init__(self, generation: Generation, *, has_logprobs: bool) -> None:
        self._generation = generation
        self._has_logprobs = has_logprobs

    def chunks(self, piece: Piece, *, is_first: bool) -> Iterator[Completion]:  # noqa: ARG002
        """One chunk, unless the piece adds nothing that is certain yet."""
        if piece.text or piece.finish_reason or (self._has_logprobs and piece.tokens):
            yield self._completion([self._choice(piece.index, [piece])], piece)

    def usage_chunk(self, piece: Piece, usage: Usage) -> Completion:
        """No choices, the usage."""
        return self._completion([], piece, usage)

    def whole(self, choices: list[list[Piece]], usage: Usage) -> Completion:
        """The choices of the first prompt, then those of the second, …"""
        written = [self._choice(index, pieces) for index, pieces in enumerate(choices)]
        return self._completion(written, choices[0][-1], usage)

    def _choice(self, index: int, pieces: list[Piece]) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text="".join(piece.text for piece in pieces),
            logprobs=self._logprobs(pieces),
            finish_reason=pieces[-1].finish_reason,
        )

    def _completion(
        self, choices: list[CompletionChoice], piece: Piece, usage: Usage | None = None
    ) -> Completion:
        return Completion(
            id=self._generation.completion_id,
            object="text_completion",
            created=self._generation.created,
            model=self._generation.addressee.model_name,
            choices=choices,
            adapter=piece.adapter,
            usage=usage,
        )

    def _logprobs(self, pieces: list[Piece]) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        return completion_logprobs(self._generation.state.tokenizer, tokens)


def _token_ids(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Every prompt as token ids; InvalidRequest for an empty one or an id that does not exist."""
    encoded = []
    for prompt in prompts:
        token_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not token_ids:
            raise InvalidRequest("'prompt' holds no token: send at least one", param="prompt")
        for token_id in token_ids:
            if not 0 <= token_id < tokenizer.vocab_size:
                raise InvalidRequest(
                    f"'prompt' holds token id {token_id}: use ids from 0 to "
                    f"{tokenizer.vocab_size - 1}",
                    param="prompt",
                )
        encoded.append(token_ids)
    return encoded
