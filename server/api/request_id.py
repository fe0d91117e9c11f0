"""The outermost layer: a request id on every answer, every request counted, no fault unanswered."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.faults import error_response
from server.errors import InternalError
from server.metrics import Metrics

HEADER = "x-request-id"

logger = logging.getLogger(__name__)

_VALID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestIds:
    """ASGI middleware. The caller's `x-request-id` if it is sound (128 of `A-Za-z0-9._:/+=-`)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(scope, send, self._metrics).run(self._app, receive)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, send: Send, metrics: Metrics) -> None:
        self._scope = scope
        self._send = send
        self._metrics = metrics
        self._status: int | None = None  # once the answer has begun
        given = Headers(scope=scope).get(HEADER, "")
        self._request_id = given if _VALID.fullmatch(given) else f"req-{uuid.uuid4().hex}"

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        try:
            await app(self._scope, receive, self._send_with_id)
        except ClientDisconnect:
            self._metrics.disconnects.inc()
        except Exception:
            logger.exception("request %s failed", self._request_id)
            if self._status is not None:
                raise
            error = InternalError(
                f"an internal error ended the request: the server's log has it as "
                f"{self._request_id}"
            )
            await error_response(error)(self._scope, receive, self._send_with_id)
        finally:
            if self._status is not None:
                self._metrics.requests.labels(self._route(), str(self._status)).inc()

    async def _send_with_id(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message)[HEADER] = self._request_id
        await self._send(message)

    def _route(self) -> str:
        """The route's pattern; never the path, which a client may choose."""
        return getattr(self._scope.get("route"), "path", "unmatched")
