"""GET /v1/models: the base model and the adapters, as OpenAI lists models."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from adapters_store.errors import UnknownAdapter
from adapters_store.versions import AdapterVersion
from server.api.answers import Answer, Json
from server.api.state import AppState, state_of
from server.errors import UnknownModel

OWNER = "manylora"

router = APIRouter()


class Model(Answer, frozen=True):
    """The base model, or an adapter (which has a parent, a version and a digest)."""

    id: str
    object: str
    created: int  # unix seconds
    owned_by: str
    root: str  # what the weights are: the base model, or the adapter version
    max_model_len: int
    parent: str | None = None
    version: int | None = None
    digest: str | None = None


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base model first, then the adapters."""
    state = state_of(request)
    adapters = await run_in_threadpool(state.store.adapters)
    models = [_base(state), *(_adapter(state, each.current) for each in adapters)]
    return Json({"object": "list", "data": models})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> Response:
    """The base model, or the adapter version that a reference names."""
    state = state_of(request)
    if model == state.model_name:
        return Json(_base(state))
    reference = model.removeprefix(f"{state.model_name}:")
    try:
        version = await run_in_threadpool(state.store.resolve, reference)
    except UnknownAdapter:
        raise UnknownModel(
            f"no model or adapter '{model[:300]}': GET /v1/models lists what there is",
            param="model",
        ) from None
    return Json(_adapter(state, version))


def _base(state: AppState) -> Model:
    return Model(
        id=state.model_name,
        object="model",
        created=state.created,
        owned_by=OWNER,
        root=state.model_name,
        max_model_len=_max_model_len(state),
    )


def _adapter(state: AppState, version: AdapterVersion) -> Model:
    owner, slash, _ = version.adapter_id.partition("/")
    return Model(
        id=version.adapter_id,
        object="model",
        created=int(version.created_at),
        owned_by=owner if slash else OWNER,
        root=f"{version.adapter_id}@{version.version}",
        max_model_len=_max_model_len(state),
        parent=state.model_name,
        version=version.version,
        digest=version.digest,
    )


def _max_model_len(state: AppState) -> int:
    """The context; that of the model alone while the engine, which may allow less, starts."""
    started = state.engine.started
    return state.max_context if started is None else min(state.max_context, started.max_context)
