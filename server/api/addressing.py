"""Which model answers: the base, one adapter version, or a weighted combination of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from adapters_store.errors import AdapterRefused, UnknownAdapter
from adapters_store.store import AdapterStore
from adapters_store.versions import AdapterVersion
from server.api.answers import AppliedAdapter, AppliedPart
from server.api.combining import (
    Member,
    check_alone,
    check_distinct,
    check_fit,
    named_members,
)
from server.api.state import AppState
from server.api.wire import GenerationBody
from server.engine.request import AdapterImage, AdapterPart, combination
from server.errors import AdapterUnservable, InvalidRequest, UnknownModel


@dataclass(frozen=True, slots=True)
class Addressee:
    """What answers a request, settled before it is submitted; replacing a name changes nothing."""

    model_name: str  # as answers give it: the base model's name, or the adapter_ids joined by +
    adapter_ids: tuple[str, ...] = ()  # none: the base model
    image: AdapterImage | None = None
    applied: AppliedAdapter | None = None  # to be said once the engine has reported its digest


async def resolve(state: AppState, body: GenerationBody) -> Addressee:
    """What a request names, and how much of it.

    `model` is the base model's name, an adapter reference (`name`, `name@3`, `name@sha256:…`),
    or `base:reference`; `adapter_id` is a reference, `adapters` and `merged_adapters` have several.
    Adapters of weight 0 are left out; where none is left the base model answers. Raises
    UnknownModel for a name that is not there, InvalidRequest where the parameters contradict each
    other or the adapters do not go together.
    """
    named = named_members(body)
    if named is None:
        members = await _one(state, body)
    else:
        check_alone(body, _adapter_part(state.model_name, body.model))
        members = [
            Member(await _version(state, each.param, each.reference), each.weight, each.param)
            for each in named
        ]
        check_distinct(members)
    members = [member for member in members if member.weight != 0]
    if not members:
        return Addressee(state.model_name)
    if len(members) > 1 or members[0].weight != 1:
        check_fit(members, state.settings)
    image = await run_in_threadpool(_combined_image, state.store, members)
    adapter_ids = tuple(member.version.adapter_id for member in members)
    return Addressee("+".join(adapter_ids), adapter_ids, image, _applied(members, image))


async def _one(state: AppState, body: GenerationBody) -> list[Member]:
    """The adapter that `model` or `adapter_id` names; none for the base model."""
    if body.model is None and body.adapter_id is None:
        raise InvalidRequest(
            f"'model' is missing: name the base model, '{state.model_name}', or an adapter",
            param="model",
            code="missing_required_parameter",
        )
    references = {}
    if (reference := _adapter_part(state.model_name, body.model)) is not None:
        references["model"] = reference
    if body.adapter_id is not None:
        references["adapter_id"] = body.adapter_id
    scale = 1.0 if body.scale is None else body.scale
    if not references and scale != 1:
        raise InvalidRequest(
            f"'scale' = {scale:g} is for an adapter, and the request names none: name it as "
            "'adapter_id', or leave 'scale' out",
            param="scale",
        )
    members = [
        Member(await _version(state, param, reference), scale, param)
        for param, reference in references.items()
    ]
    versions = {(m.version.adapter_id, m.version.version): m.version for m in members}
    if len(versions) > 1:
        first, last = versions.values()
        raise InvalidRequest(
            f"'model' names adapter '{first.reference}' and 'adapter_id' '{last.reference}': "
            "name one adapter, or give the base model as 'model'",
            param="adapter_id",
        )
    return members[:1]


def _applied(members: Sequence[Member], image: AdapterImage) -> AppliedAdapter:
    parts = [
        AppliedPart(
            id=member.version.adapter_id,
            version=member.version.version,
            digest=member.version.digest,
            weight=member.weight,
        )
        for member in members
    ]
    if image.parts:
        return AppliedAdapter(digest=image.digest, parts=parts)
    return AppliedAdapter(id=parts[0].id, version=parts[0].version, digest=image.digest)


def _adapter_part(base: str, model: str | None) -> str | None:
    """The adapter reference in `model`; None where it names the base model alone."""
    if model is None or model == base:
        return None
    return model.removeprefix(f"{base}:") or model


async def _version(state: AppState, param: str, reference: str) -> AdapterVersion:
    try:
        version = await run_in_threadpool(state.store.resolve, reference)
    except UnknownAdapter as error:
        raise _unknown(param, reference, str(error)) from None
    if version.adapter_id in state.deleting:
        raise _unknown(param, reference, "it is being deleted")
    return version


def _combined_image(store: AdapterStore, members: Sequence[Member]) -> AdapterImage:
    return combination(
        AdapterPart(_image(store, member.version, member.param), member.weight)
        for member in members
    )


def _image(store: AdapterStore, version: AdapterVersion, param: str) -> AdapterImage:
    """The packed file; packs it again where this base layout is new to the store. Blocks."""
    try:
        return AdapterImage(version.digest, str(store.image(version)))
    except UnknownAdapter as error:
        raise _unknown(param, version.reference, str(error)) from None
    except AdapterRefused as error:
        raise AdapterUnservable(
            f"adapter '{version.reference}' does not fit the running base model: {error}",
            param=param,
            details={"report": error.report.to_dict()},
        ) from error


def _unknown(param: str, reference: str, why: str) -> UnknownModel:
    return UnknownModel(f"there is no model '{reference[:80]}': {why}", param=param)
