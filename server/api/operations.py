"""For whoever runs the server: /health, /ready, /version, /metrics."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from server.api.answers import Json
from server.api.state import state_of

router = APIRouter()


@router.get("/health")
async def health() -> Response:
    """200 as long as the API process answers."""
    return Json({"status": "alive"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when requests can be served; 503 while the engine is starting or restarting."""
    state = state_of(request)
    max_context = state.running_context()
    return Json({"status": "ready", "model": state.model_name, "max_context": max_context})


@router.get("/version")
async def build(request: Request) -> Response:
    """The version of manylora, and the base model that it serves."""
    return Json({"version": version("manylora"), "model": state_of(request).model_name})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(state_of(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
