"""Which linear layers an adapter's settings target, with PEFT's own matching rules.

Follows `check_target_module_exists` and `get_pattern_key` of PEFT 0.21: lists match whole names
or dotted suffixes, strings are regular expressions over the whole name, `rank_pattern` and
`alpha_pattern` keys are regular expressions over a dotted suffix, the first one wins.
The expressions come from strangers: run this where it can be killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.layout import TARGET_PATHS, BaseLayout
from adapters_store.peft_config import LoraSettings

ALL_LINEAR = "all-linear"
NOT_SERVED = ("model.embed_tokens", "lm_head")
"""Modules of the base that LoRA can target and that we do not serve adapters for."""

Place = tuple[int, str]
"""A layer's number and a key of TARGET_PATHS."""


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """What the configuration says about one module."""

    rank: int
    alpha: float
    scaling: float


def module_name(layer: int, target: str) -> str:
    """The module's name in the base model: model.layers.3.mlp.up_proj."""
    return f"model.layers.{layer}.{TARGET_PATHS[target]}"


def places(layout: BaseLayout) -> Iterable[Place]:
    """Every (layer, target) in the order of the rank-row table."""
    return ((layer, shape.name) for layer in range(layout.num_layers) for shape in layout.targets)


def targeted_modules(settings: LoraSettings, layout: BaseLayout) -> dict[Place, ModuleSettings]:
    """Settings of every module that PEFT would give an adapter, in table order.

    Raises re.error for an invalid expression, OverflowError where alpha is past a float.
    """
    return {
        (layer, target): module_settings(settings, module_name(layer, target))
        for layer, target in places(layout)
        if is_targeted(settings, module_name(layer, target))
    }


def module_settings(settings: LoraSettings, name: str) -> ModuleSettings:
    """Rank, alpha and scaling of one module, patterns applied."""
    rank = settings.rank_pattern.get(_pattern_key(settings.rank_pattern, name), settings.r)
    alpha = settings.alpha_pattern.get(
        _pattern_key(settings.alpha_pattern, name), settings.lora_alpha
    )
    scaling = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
    return ModuleSettings(rank, float(alpha), scaling)


def is_targeted(settings: LoraSettings, name: str) -> bool:
    """Whether PEFT would give the module `name` an adapter."""
    if _matches(settings.exclude_modules, name):
        return False
    targets = settings.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return name not in NOT_SERVED
    if not _matches(targets, name):
        return False
    return isinstance(targets, str) or name in targets or _layer_is_chosen(settings, name)


def unused_targets(settings: LoraSettings, layout: BaseLayout) -> list[str]:
    """Entries of the target list that name no module of this base."""
    if isinstance(settings.target_modules, str):
        return []
    names = [module_name(layer, target) for layer, target in places(layout)]
    return [
        entry
        for entry in settings.target_modules
        if not any(_matches((entry,), name) for name in (*names, *NOT_SERVED))
    ]


def _matches(entries: str | tuple[str, ...], name: str) -> bool:
    if isinstance(entries, str):
        return bool(entries) and re.fullmatch(entries, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _layer_is_chosen(settings: LoraSettings, name: str) -> bool:
    chosen = settings.layers_to_transform
    if chosen is None or chosen == ():
        return True
    patterns = settings.layers_pattern
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if match := re.match(expression, name):
            return int(match["idx"]) in ((chosen,) if isinstance(chosen, int) else chosen)
    return False


def _pattern_key(pattern: Iterable[str], name: str) -> str:
    for key in pattern:
        if re.match(rf"(.*\.)?({key})$", name):
            return key
    return name
