"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from server.api.addressing import resolve
from server.api.answers import ChatChoice, ChatDelta, ChatLogprobs, ChatMessage, Completion, Usage
from server.api.body import read_body
from server.api.generation import Generation, Piece
from server.api.logprobs import chat_logprobs
from server.api.responding import respond
from server.api.state import state_of
from server.api.submission import Length, new_generation
from server.api.wire import ChatBody
from server.errors import InvalidRequest

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation with the base model or an adapter."""
    state = state_of(request)
    body = await read_body(request, ChatBody)
    length, num_logprobs = _length(body), _num_logprobs(body)
    state.running_context()
    addressee = await resolve(state, body)
    messages = [message.for_template() for message in body.messages]
    prompt = await run_in_threadpool(state.tokenizer.encode_chat, messages)
    generation = new_generation(state, "chatcmpl", body, addressee, [prompt], length, num_logprobs)
    shape = ChatShape(generation, has_logprobs=num_logprobs is not None)
    return await respond(
        request, generation, shape, stream=bool(body.stream), usage=body.includes_usage
    )


class ChatShape:
    """Pieces as chat completions and their chunks."""

    def __init__(self, generation: Generation, *, has_logprobs: bool) -> None:
        self._generation = generation
        self._has_logprobs = has_logprobs

    def chunks(self, piece: Piece, *, is_first: bool) -> Iterator[Completion]:
        """The role first, then text, the finish reason last in a chunk without text."""
        logprobs = self._logprobs([piece]) if piece.tokens else None
        if is_first:
            yield self._chunk(piece, ChatDelta(role="assistant", content=""))
        if piece.text or logprobs:
            yield self._chunk(piece, ChatDelta(content=piece.text), logprobs)
        if piece.finish_reason:
            yield self._chunk(piece, ChatDelta(), finish_reason=piece.finish_reason)

    def usage_chunk(self, piece: Piece, usage: Usage) -> Completion:
        """No choices, the usage."""
        return self._completion("chat.completion.chunk", [], piece, usage)

    def whole(self, choices: list[list[Piece]], usage: Usage) -> Completion:
        """One choice for each of the request's `n`."""
        written = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content="".join(p.text for p in pieces)),
                logprobs=self._logprobs(pieces),
                finish_reason=pieces[-1].finish_reason,
            )
            for index, pieces in enumerate(choices)
        ]
        return self._completion("chat.completion", written, choices[0][-1], usage)

    def _chunk(
        self,
        piece: Piece,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> Completion:
        choice = ChatChoice(
            index=piece.index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return self._completion("chat.completion.chunk", [choice], piece)

    def _completion(
        self, kind: str, choices: list[ChatChoice], piece: Piece, usage: Usage | None = None
    ) -> Completion:
        return Completion(
            id=self._generation.completion_id,
            object=kind,
            created=self._generation.created,
            model=self._generation.addressee.model_name,
            choices=choices,
            adapter=piece.adapter,
            usage=usage,
        )

    def _logprobs(self, pieces: list[Piece]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        return chat_logprobs(self._generation.state.tokenizer, tokens)


def _length(body: ChatBody) -> Length:
    if body.max_completion_tokens is None:
        return Length(body.max_tokens, "max_tokens")
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequest(
            f"'max_tokens' = {body.max_tokens} and 'max_completion_tokens' = "
            f"{body.max_completion_tokens} contradict each other: give one of them",
            param="max_tokens",
        )
    return Length(body.max_completion_tokens, "max_completion_tokens")


def _num_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs is not None:
        raise InvalidRequest(
            f"'top_logprobs' = {body.top_logprobs} needs 'logprobs' = true: set it, or leave "
            "'top_logprobs' out",
            param="top_logprobs",
        )
    return None
