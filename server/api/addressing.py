"""Which model answers: the base or one adapter version, from `model` and `adapter_id`."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from adapters_store.errors import AdapterRefused, UnknownAdapter
from adapters_store.store import AdapterStore
from adapters_store.versions import AdapterVersion
from server.api.state import AppState
from server.engine.request import AdapterImage
from server.errors import AdapterUnservable, InvalidRequest, UnknownModel


@dataclass(frozen=True, slots=True)
class Addressee:
    """What answers a request, settled before it is submitted; replacing a name changes nothing."""

    model_name: str  # as answers give it: the base model's name, or the adapter_id
    version: AdapterVersion | None = None  # None: the base model
    image: AdapterImage | None = None


async def resolve(state: AppState, model: str | None, adapter_id: str | None) -> Addressee:
    """The base model or the adapter version that a request names.

    `model` is the base model's name, an adapter reference (`name`, `name@3`, `name@sha256:…`),
    or `base:reference`; `adapter_id` is a reference. Raises UnknownModel for a name that is
    neither, InvalidRequest where the two name different adapters or neither is given.
    """
    if model is None and adapter_id is None:
        raise InvalidRequest(
            f"'model' is missing: name the base model, '{state.model_name}', or an adapter",
            param="model",
            code="missing_required_parameter",
        )
    references = {}
    if (reference := _adapter_part(state.model_name, model)) is not None:
        references["model"] = reference
    if adapter_id is not None:
        references["adapter_id"] = adapter_id
    if not references:
        return Addressee(state.model_name)
    versions = [await _version(state, *each) for each in references.items()]
    first, last = versions[0], versions[-1]
    if (first.adapter_id, first.version) != (last.adapter_id, last.version):
        raise InvalidRequest(
            f"'model' names adapter '{first.reference}' and 'adapter_id' '{last.reference}': "
            "name one adapter, or give the base model as 'model'",
            param="adapter_id",
        )
    image = await run_in_threadpool(_image, state.store, first, next(iter(references)))
    return Addressee(first.adapter_id, first, image)


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
