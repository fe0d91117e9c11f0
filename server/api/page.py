"""GET /: the page on which a person compares two adapters."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
"""One file, no external resources."""

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'"
)

router = APIRouter()


@router.get("/")
async def page() -> Response:
    """The page."""
    return HTMLResponse(PAGE, headers={"content-security-policy": _POLICY})
