"""From the bytes of a body to a wire model, with errors that name the parameter."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from server.api.wire import IGNORED, UNSUPPORTED, Wire
from server.errors import InvalidRequest, PayloadTooLarge

MAX_BODY_BYTES = 32 << 20
"""Largest JSON body; far above any context's text."""

_MAX_SHOWN = 80
_OF_MANY = {"dict_type", "list_type", "string_type", "int_type", "float_type", "bool_type"}

Body = TypeVar("Body", bound=Wire)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's JSON as `model`; InvalidRequest or PayloadTooLarge otherwise."""
    return parse_body(await _read_limited(request), model)


def parse_body(raw: bytes, model: type[Body]) -> Body:
    """`raw` as `model`; InvalidRequest names the first parameter at fault."""
    members = _decode(raw)
    for name, harmless in UNSUPPORTED.items():
        value = members.get(name)
        if name in members and name not in model.model_fields:
            if value is not None and not any(_is_same(value, each) for each in harmless):
                raise _unsupported(name, value)
            del members[name]
    try:
        return model.model_validate({k: v for k, v in members.items() if k not in IGNORED})
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0]) from None


async def _read_limited(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise PayloadTooLarge(
                f"the body exceeds {MAX_BODY_BYTES} bytes, the limit for JSON: send a shorter one"
            )
    return bytes(body)


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"the body is not valid JSON in UTF-8: {error}; send one JSON object",
            code="invalid_json",
        ) from None
    if not isinstance(decoded, dict):
        raise InvalidRequest(
            f"the body must be a JSON object, not {_shown(decoded)}", code="invalid_json"
        )
    return decoded


def _is_same(value: Any, harmless: Any) -> bool:
    """Equality that does not take true for 1 or false for 0."""
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)


def _unsupported(name: str, value: Any) -> InvalidRequest:
    return InvalidRequest(
        f"'{name}' = {_shown(value)} is not supported by this server: leave it out",
        param=name,
        code="unsupported_parameter",
    )


def _invalid(fault: ErrorDetails) -> InvalidRequest:
    param = _path(fault["loc"])
    if fault["type"] == "missing":
        return InvalidRequest(
            f"'{param}' is missing: it is required",
            param=param,
            code="missing_required_parameter",
        )
    if fault["type"] == "extra_forbidden":
        return InvalidRequest(
            f"'{param}' is not a parameter of this route: check its spelling or leave it out",
            param=param,
            code="unknown_parameter",
        )
    code = "invalid_type" if fault["type"] in _OF_MANY else "invalid_value"
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return InvalidRequest(
        f"'{param}' = {_shown(fault['input'])} is invalid: {message}", param=param, code=code
    )


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
