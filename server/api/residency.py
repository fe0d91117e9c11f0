"""Adapters as clients see them: versions, and where each is now, from store and engine report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from adapters_store.versions import Adapter, AdapterVersion
from server.api.answers import Answer
from server.engine.request import Load, ResidentAdapter


class VersionAnswer(Answer, frozen=True):
    """One version of an adapter and its place: disk, host, loading or resident."""

    version: int
    digest: str
    created: int  # unix seconds
    state: Literal["disk", "host", "loading", "resident"]
    num_pages: int  # on the device, when it is resident
    num_users: int  # running sequences
    num_uses: int  # sequences since it was loaded
    bytes: int  # on disk
    description: str | None = None
    report: dict[str, Any] | None = None


class AdapterAnswer(Answer, frozen=True):
    """An adapter: what its name means now, and its versions, newest first."""

    id: str
    object: str
    version: int
    digest: str
    created: int  # unix seconds; of the current version
    state: Literal["disk", "host", "loading", "resident"]
    num_pages: int
    num_users: int
    versions: list[VersionAnswer]
    description: str | None = None
    report: dict[str, Any] | None = None  # of the current version


def residents(load: Load | None) -> dict[str, ResidentAdapter]:
    """The adapters on the device by digest; none without a report."""
    return {} if load is None else {adapter.digest: adapter for adapter in load.adapters}


def adapter_answer(
    adapter: Adapter, on_device: Mapping[str, ResidentAdapter], *, with_reports: bool
) -> AdapterAnswer:
    """The adapter with its versions; reports are long, and left out of lists."""
    versions = sorted(adapter.versions, key=lambda each: -each.version)
    answers = [_version_answer(each, on_device, with_reports=with_reports) for each in versions]
    current = next(each for each in answers if each.version == adapter.current.version)
    return AdapterAnswer(
        id=adapter.adapter_id,
        object="adapter",
        version=current.version,
        digest=current.digest,
        created=current.created,
        state=current.state,
        num_pages=current.num_pages,
        num_users=current.num_users,
        versions=answers,
        description=current.description,
        report=current.report,
    )


def _version_answer(
    version: AdapterVersion, on_device: Mapping[str, ResidentAdapter], *, with_reports: bool
) -> VersionAnswer:
    resident = on_device.get(version.digest)
    return VersionAnswer(
        version=version.version,
        digest=version.digest,
        created=int(version.created_at),
        state="disk" if resident is None else resident.state,
        num_pages=version.num_pages,
        num_users=0 if resident is None else resident.num_users,
        num_uses=0 if resident is None else resident.num_uses,
        bytes=version.bytes,
        description=version.description or None,
        report=version.report.to_dict() if with_reports else None,
    )
