"""Every fault on every route as OpenAI's error object: ours, the framework's, the unforeseen."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.api.answers import Json
from server.errors import (
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    ServerError,
    UnknownRoute,
)


def install(app: FastAPI) -> None:
    """Make the app answer its exceptions with error objects."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)


def error_response(error: ServerError, headers: dict[str, str] | None = None) -> Response:
    """The error as a response; its own headers, and the given ones."""
    return Json(
        error.body(), status_code=error.status, headers={**error.headers, **(headers or {})}
    )


async def _server_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    """The router's 404 and 405, and what else the framework raises."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_response(
            UnknownRoute(f"there is no {where}: docs/api.md lists the routes"), headers
        )
    if error.status_code == 405:
        allowed = headers.get("allow") or headers.get("Allow") or "another method"
        return error_response(MethodNotAllowed(f"there is no {where}: use {allowed}"), headers)
    if error.status_code == 413:
        return error_response(PayloadTooLarge(f"{error.detail}: send a shorter body"), headers)
    return error_response(InvalidRequest(f"{error.detail}: check the request"), headers)


async def _validation_error(_request: Request, error: Exception) -> Response:
    """A query parameter out of its range; bodies are read by `server.api.body`."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    param = str(fault["loc"][-1])
    message = f"'{param}' = {fault.get('input')!r} is invalid: {fault['msg']}"
    return error_response(InvalidRequest(message, param=param))
