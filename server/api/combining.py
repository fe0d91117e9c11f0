"""Which adapters a request combines, with which weights, and whether they go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from adapters_store.versions import AdapterVersion
from server.api.wire import GenerationBody
from server.config import Settings
from server.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter as a request names it."""

    param: str  # the parameter that does
    reference: str
    weight: float


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter version of which `weight` is applied."""

    version: AdapterVersion
    weight: float
    param: str


def named_members(body: GenerationBody) -> list[Named] | None:
    """The members of the combination that a request asks for; None where it asks for none."""
    if body.adapters is not None:
        return [Named(f"adapters[{i}].id", x.id, x.weight) for i, x in enumerate(body.adapters)]
    merged = body.merged_adapters
    if merged is None:
        return None
    weights = [1.0] * len(merged.ids) if merged.weights is None else merged.weights
    if len(weights) != len(merged.ids):
        raise InvalidRequest(
            f"'merged_adapters.weights' has {len(weights)} weights for {len(merged.ids)} ids: "
            "give one for each",
            param="merged_adapters.weights",
        )
    pairs = enumerate(zip(merged.ids, weights, strict=True))
    return [Named(f"merged_adapters.ids[{i}]", *pair) for i, pair in pairs]


def check_alone(body: GenerationBody, model_adapter: str | None) -> None:
    """InvalidRequest where a request names more than its combination.

    `model_adapter` is the adapter that `model` names, if it does.
    """
    param = "adapters" if body.adapters is not None else "merged_adapters"
    scale = None if body.scale == 1.0 else body.scale
    others = {"model": model_adapter, "adapter_id": body.adapter_id, "scale": scale}
    if param == "adapters" and body.merged_adapters is not None:
        others["merged_adapters"] = ", ".join(body.merged_adapters.ids)
    for name, value in others.items():
        if value is not None:
            raise InvalidRequest(
                f"'{name}' = {value!r} beside '{param}' is one too many: name every adapter, with "
                f"its whole weight, in '{param}'",
                param=name,
            )


def check_distinct(members: Sequence[Member]) -> None:
    """InvalidRequest where two members are the same weights, under one name or two."""
    seen: dict[str, Member] = {}
    for member in members:
        other = seen.setdefault(member.version.digest, member)
        if other is not member:
            raise InvalidRequest(
                f"'{other.version.reference}' and '{member.version.reference}' are the same "
                "weights: name them once, with the sum of both",
                param=member.param,
            )


def check_fit(members: Sequence[Member], settings: Settings) -> None:
    """InvalidRequest for a combination that takes too many slots, or too high a rank somewhere.

    As far as is known here: reports list the modules of the first layers. The engine counts the
    pages and rows of all members before it loads one.
    """
    param = members[-1].param.partition("[")[0]
    if len(members) >= settings.max_adapters:
        raise InvalidRequest(
            f"{len(members)} weighted adapters take {len(members) + 1} slots, and there are "
            f"{settings.max_adapters}: leave adapters out, or raise max_adapters",
            param=param,
        )
    ranks: dict[str, list[int]] = defaultdict(list)
    for member in members:
        for module in member.version.report.modules:
            ranks[module.name].append(module.rank)
    for name, each in ranks.items():
        if sum(each) > settings.max_adapter_rank:
            raise InvalidRequest(
                f"the adapters have rank {' + '.join(map(str, each))} = {sum(each)} in {name}, "
                f"above the limit of {settings.max_adapter_rank}: leave adapters out, or raise "
                "max_adapter_rank",
                param=param,
            )
