"""Every error that a client can be told, and the one table from error to HTTP answer.

ServerError
├── InvalidRequest          a parameter, a body, a prompt: 400, names the parameter
│   └── ContextTooLong      400 context_length_exceeded
├── NotFound                404
│   ├── UnknownModel        404 model_not_found: no base model or adapter of that name
│   └── UnknownRoute        404
├── MethodNotAllowed        405
├── RequestCancelled        410: its adapter was deleted with mode=abort while it ran
├── PayloadTooLarge         413
├── AdapterUnservable       422, refused at upload; carries the report
├── Overloaded              429, with Retry-After
│   ├── QueueFull           429 queue_full: as many requests wait as may
│   └── QueueTimeout        429 queue_timeout: it waited, or would wait, longer than it may
├── InternalError           500
└── EngineUnavailable       503: the engine is starting
    └── EngineLost          503: the engine died with the request in it

CannotServe                 told to who starts the server: there is no client yet
"""

from __future__ import annotations

from typing import Any, NamedTuple

RETRY_AFTER_SECONDS = 2
"""What a client is told to wait after an answer that another try may mend."""


class ServerError(Exception):
    """A fault with a message for the client, and the parameter at fault if there is one.

    `code` replaces the code of the table; `details` are members of the error body beside `error`;
    `retry_after` is in seconds, told with a 429 or 503.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        details: dict[str, Any] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.answer = answer_for(type(self))
        self.code = code or self.answer.code
        self.details = details or {}
        self.retry_after = RETRY_AFTER_SECONDS if retry_after is None else retry_after

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.answer.status

    @property
    def headers(self) -> dict[str, str]:
        """Headers that the answer needs besides the body."""
        if self.status in (429, 503):
            return {"retry-after": str(self.retry_after)}
        return {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, all four keys present, and the details."""
        error = {
            "message": self.message,
            "type": self.answer.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error, **self.details}


class InvalidRequest(ServerError):
    """The request cannot be honoured as it is."""


class ContextTooLong(InvalidRequest):
    """Prompt, or prompt and completion, exceed the context."""


class NotFound(ServerError):
    """Nothing of that name."""


class UnknownModel(NotFound):
    """Neither base model nor adapter."""


class UnknownRoute(NotFound):
    """No such path."""


class MethodNotAllowed(ServerError):
    """The path exists, the method does not."""


class RequestCancelled(ServerError):
    """Somebody else ended this request."""


class PayloadTooLarge(ServerError):
    """The body exceeds a limit."""


class AdapterUnservable(ServerError):
    """An adapter that was checked and refused."""


class Overloaded(ServerError):
    """No room now."""


class QueueFull(Overloaded):
    """As many requests wait as may."""


class QueueTimeout(Overloaded):
    """The request waited, or would wait, longer than it may."""


class InternalError(ServerError):
    """Our fault."""


class EngineUnavailable(ServerError):
    """The engine is starting."""


class EngineLost(EngineUnavailable):
    """The engine ended while it worked on the request; it is started again."""


class CannotServe(Exception):
    """The server cannot start; the message says why and what to do."""


class Answer(NamedTuple):
    """How an error is told over HTTP."""

    status: int
    type: str
    code: str


ANSWERS: dict[type[ServerError], Answer] = {
    InvalidRequest: Answer(400, "invalid_request_error", "invalid_value"),
    ContextTooLong: Answer(400, "invalid_request_error", "context_length_exceeded"),
    NotFound: Answer(404, "invalid_request_error", "not_found"),
    UnknownModel: Answer(404, "invalid_request_error", "model_not_found"),
    UnknownRoute: Answer(404, "invalid_request_error", "unknown_url"),
    MethodNotAllowed: Answer(405, "invalid_request_error", "method_not_allowed"),
    RequestCancelled: Answer(410, "invalid_request_error", "request_cancelled"),
    PayloadTooLarge: Answer(413, "invalid_request_error", "payload_too_large"),
    AdapterUnservable: Answer(422, "invalid_request_error", "adapter_refused"),
    Overloaded: Answer(429, "rate_limit_error", "overloaded"),
    QueueFull: Answer(429, "rate_limit_error", "queue_full"),
    QueueTimeout: Answer(429, "rate_limit_error", "queue_timeout"),
    InternalError: Answer(500, "server_error", "internal_error"),
    EngineUnavailable: Answer(503, "server_error", "engine_unavailable"),
    EngineLost: Answer(503, "server_error", "engine_lost"),
}


def answer_for(error: type[ServerError]) -> Answer:
    """The table's row for an error class, or for the nearest class above it."""
    for ancestor in error.__mro__:
        if ancestor in ANSWERS:
            return ANSWERS[ancestor]
    return ANSWERS[InternalError]


def error_with_code(code: str | None, message: str, retry_after: int | None = None) -> ServerError:
    """The error that a code of the table means; InternalError for a code that is not in it."""
    for error, answer in ANSWERS.items():
        if answer.code == code:
            return error(message, retry_after=retry_after)
    return InternalError(message)
