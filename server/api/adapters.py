"""/v1/adapters: upload, list, look at and delete adapters."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from adapters_store.errors import InvalidAdapterId, UnknownAdapter
from adapters_store.report import Report
from adapters_store.versions import Adapter, AdapterVersion
from server.api.admitting import admit
from server.api.answers import Answer, Json
from server.api.residency import adapter_answer, residents
from server.api.state import AppState, state_of
from server.api.upload import receive_upload
from server.engine.request import AdapterImage
from server.errors import UnknownModel

logger = logging.getLogger(__name__)

router = APIRouter()

_LOOK_SECONDS = 0.02
"""Between two looks at whether the requests of a deleted adapter have ended."""


class Admitted(Answer, frozen=True):
    """An upload's answer; a dry run admits nothing and has no version."""

    id: str
    report: dict[str, Any]
    version: int | None = None
    digest: str | None = None
    dry_run: bool = False


class Deleted(Answer, frozen=True):
    """A deletion's answer."""

    id: str
    object: str
    deleted: bool
    versions: list[int]
    freed_bytes: int  # of device memory


@router.post("/v1/adapters")
async def upload_adapter(request: Request) -> Response:
    """Check an adapter and admit it as a new version of its name, or only check it."""
    state = state_of(request)
    # Not in a thread: the directory must go even if this task is cancelled.
    with state.store.staging() as staging:
        upload = await receive_upload(request, staging, state.settings.max_upload_bytes)
        added = await run_in_threadpool(admit, state, upload)
    if isinstance(added, Report):
        return Json(Admitted(id=upload.texts["adapter_id"], report=added.to_dict(), dry_run=True))
    await _preload(state, added)
    return Json(
        Admitted(
            id=added.adapter_id,
            report=added.report.to_dict(),
            version=added.version,
            digest=added.digest,
        ),
        status_code=201,
    )


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    """Every adapter with its versions and where they are."""
    state = state_of(request)
    adapters = await run_in_threadpool(state.store.adapters)
    on_device = residents(state.engine.load)
    data = [adapter_answer(each, on_device, with_reports=False) for each in adapters]
    return Json({"object": "list", "data": data})


@router.get("/v1/adapters/{adapter_id:path}")
async def get_adapter(request: Request, adapter_id: str) -> Response:
    """One adapter, with the report of each version."""
    state = state_of(request)
    adapter = await run_in_threadpool(_get, state, adapter_id)
    return Json(adapter_answer(adapter, residents(state.engine.load), with_reports=True))


@router.delete("/v1/adapters/{adapter_id:path}")
async def delete_adapter(
    request: Request, adapter_id: str, mode: Literal["drain", "abort"] = "drain"
) -> Response:
    """Take the name away, let its requests end (drain) or end them (abort), free everything."""
    state = state_of(request)
    if adapter_id in state.deleting:
        raise _unknown(adapter_id)
    state.deleting.add(adapter_id)
    try:
        await _end_requests(state, adapter_id, abort=mode == "abort")
        own_digests = await run_in_threadpool(_own_digests, state, adapter_id)
        # The files go last: a request that still waits for its adapter needs them.
        drops = [state.engine.drop(digest, mode == "abort") for digest in own_digests]
        freed_bytes = sum(dropped.freed_bytes for dropped in await asyncio.gather(*drops))
        versions = await run_in_threadpool(_delete, state, adapter_id)
    finally:
        state.deleting.discard(adapter_id)
    answer = Deleted(
        id=adapter_id,
        object="adapter",
        deleted=True,
        versions=sorted(each.version for each in versions),
        freed_bytes=freed_bytes,
    )
    return Json(answer)


async def _end_requests(state: AppState, adapter_id: str, *, abort: bool) -> None:
    """Wait until no request of the name runs; with `abort`, cancel them first."""
    await run_in_threadpool(_get, state, adapter_id)
    if abort:
        for request_id in tuple(state.running.get(adapter_id, ())):
            await state.engine.cancel(request_id)
    while adapter_id in state.running:
        await asyncio.sleep(_LOOK_SECONDS)


async def _preload(state: AppState, version: AdapterVersion) -> None:
    """Have a new adapter resident before its first request, if that is possible now."""
    try:
        path = await run_in_threadpool(state.store.image, version)
    except UnknownAdapter as error:
        logger.info("%s was deleted before it was preloaded: %s", version.reference, error)
    else:
        await state.engine.preload(AdapterImage(version.digest, str(path)))


def _get(state: AppState, adapter_id: str) -> Adapter:
    try:
        return state.store.get(adapter_id)
    except (UnknownAdapter, InvalidAdapterId):
        raise _unknown(adapter_id) from None


def _own_digests(state: AppState, adapter_id: str) -> list[str]:
    """The digests that only this adapter has, each once."""
    mine = {version.digest for version in _get(state, adapter_id).versions}
    others = {
        version.digest
        for adapter in state.store.adapters()
        if adapter.adapter_id != adapter_id
        for version in adapter.versions
    }
    return sorted(mine - others)


def _delete(state: AppState, adapter_id: str) -> tuple[AdapterVersion, ...]:
    try:
        return state.store.delete(adapter_id)
    except UnknownAdapter:
        raise _unknown(adapter_id) from None


def _unknown(adapter_id: str) -> UnknownModel:
    return UnknownModel(
        f"no adapter '{adapter_id[:300]}': GET /v1/adapters lists what there is",
        param="adapter_id",
    )
