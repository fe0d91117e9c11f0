"""adapter_config.json read strictly: what is honoured, what is harmless, what is refused by name.

Covers every key that PEFT 0.21 writes for LoRA. A key that is not known here is refused unless
its value switches it off, since it may change the arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from adapters_store.errors import FileRefused
from adapters_store.peft_settings import (
    BASE_ALTERING_INITS,
    HARMLESS,
    PLAIN_INITS,
    REFUSED_UNLESS_OFF,
)
from adapters_store.report import Problem
from adapters_store.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16
MAX_ALPHA = 1e30


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The keys that decide the arithmetic, with PEFT's names, meanings and defaults."""

    target_modules: str | tuple[str, ...]
    r: int = 8
    lora_alpha: int | float = 8
    use_rslora: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None


@dataclass(frozen=True, slots=True)
class ConfigReading:
    """settings is None where there are problems."""

    settings: LoraSettings | None
    problems: tuple[Problem, ...]
    harmless: tuple[str, ...]


def read_config(raw: bytes) -> ConfigReading:
    """Read the bytes of adapter_config.json; FileRefused where it is not a JSON object."""
    config = _parse(raw)
    problems = [*_kind_problems(config)]
    if not problems:
        problems += _refused_settings(config)
    settings = None
    try:
        settings = _settings(config)
    except msgspec.ValidationError as error:
        problems.append(_invalid(str(error), "write the file with PEFT's save_pretrained"))
    if settings is not None:
        problems += _value_problems(settings)
    return ConfigReading(
        settings if not problems else None, tuple(problems), tuple(_harmless_settings(config))
    )


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_CONFIG_BYTES:
        raise FileRefused(
            _invalid(f"the file has {len(raw)} bytes, the limit is {MAX_CONFIG_BYTES}", "shrink it")
        )
    try:
        return parse_object(raw)
    except ValueError as error:
        raise FileRefused(
            _invalid(str(error), "upload the file as PEFT's save_pretrained writes it")
        ) from error


def _invalid(message: str, remedy: str) -> Problem:
    return Problem("invalid_config", f"{CONFIG_FILE}: {message[:300]}", remedy)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_off(value: Any) -> bool:
    """Null, false and empty: what switches a setting off for PEFT."""
    return value is None or value is False or value in ("", [], {})


def _kind_problems(config: dict[str, Any]) -> list[Problem]:
    """The adapter must be a LoRA for a causal language model; nothing else is looked at if not."""
    peft_type, task_type = config.get("peft_type"), config.get("task_type")
    problems = []
    if peft_type != "LORA":
        problems.append(
            Problem(
                "unsupported_peft_type",
                f"{CONFIG_FILE}: peft_type is {_shown(peft_type)}, only LORA is served",
                "train a LoRA adapter, or convert this one to LoRA (peft.convert_to_lora)",
            )
        )
    if task_type not in (None, "CAUSAL_LM"):
        problems.append(
            Problem(
                "unsupported_task_type",
                f"{CONFIG_FILE}: task_type is {_shown(task_type)}, only CAUSAL_LM is served",
                "train the adapter on the causal language model",
            )
        )
    return problems


def _refused_settings(config: dict[str, Any]) -> list[Problem]:
    problems = []
    honoured = {entry.name for entry in fields(LoraSettings)}
    for key, value in config.items():
        if key in honoured or key in HARMLESS or key in ("peft_type", "task_type"):
            continue
        if key == "init_lora_weights":
            problems += _init_problems(value)
        elif key == "bias":
            if value not in (None, "none"):
                problems.append(_unsupported(key, value, *REFUSED_UNLESS_OFF[key]))
        elif _is_off(value):
            continue
        elif key in REFUSED_UNLESS_OFF:
            problems.append(_unsupported(key, value, *REFUSED_UNLESS_OFF[key]))
        else:
            reason = "this setting is not known and may change the arithmetic"
            remedy = "remove it if it has no effect on inference"
            problems.append(_unsupported(key[:80], value, reason, remedy, code="unknown_setting"))
    return problems


def _unsupported(
    key: str, value: Any, reason: str, remedy: str, code: str = "unsupported_setting"
) -> Problem:
    return Problem(code, f"{CONFIG_FILE}: {key} is {_shown(value)}, {reason}", remedy)


def _init_problems(value: Any) -> list[Problem]:
    name = value.lower() if isinstance(value, str) else value
    if name is None or any(type(name) is type(plain) and name == plain for plain in PLAIN_INITS):
        return []
    if isinstance(name, str) and name.startswith(BASE_ALTERING_INITS):
        reason = "which changed the base weights before training, so that the adapter is wrong here"
        remedy = (
            "save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "which makes it a plain LoRA; for LoftQ, train on the plain base"
        )
    else:
        reason = "which is not a way of initialising that is known to leave the base unchanged"
        remedy = "set it to true if the base weights were not changed"
    return [_unsupported("init_lora_weights", value, reason, remedy)]


def _settings(config: dict[str, Any]) -> LoraSettings:
    """The honoured keys, nulls replaced by defaults; msgspec.ValidationError names a bad one."""
    given = {
        entry.name: config[entry.name]
        for entry in fields(LoraSettings)
        if config.get(entry.name) is not None
    }
    if isinstance(given.get("layers_pattern"), str):
        given["layers_pattern"] = [given["layers_pattern"]] if given["layers_pattern"] else []
    return msgspec.convert(given, LoraSettings)


def _value_problems(settings: LoraSettings) -> list[Problem]:
    """Values of the right type and without meaning; combinations that PEFT refuses."""
    problems = []
    ranks = {"r": settings.r, **settings.rank_pattern}
    problems += [
        _invalid(
            f"the rank of {name[:80]!r} is not between 1 and {MAX_RANK}",
            "give every module a positive rank",
        )
        for name, rank in ranks.items()
        if not 1 <= rank <= MAX_RANK
    ]
    alphas = {"lora_alpha": settings.lora_alpha, **settings.alpha_pattern}
    problems += [
        _invalid(f"the alpha of {name[:80]!r} is past {MAX_ALPHA:g}", "use a finite alpha")
        for name, alpha in alphas.items()
        if abs(alpha) > MAX_ALPHA
    ]
    by_layer = settings.layers_to_transform is not None or settings.layers_pattern
    if isinstance(settings.target_modules, str) and by_layer:
        problems.append(
            _invalid(
                "layers_to_transform and layers_pattern need a list of target_modules",
                "put the layers into the expression",
            )
        )
    if settings.layers_pattern and settings.layers_to_transform is None:
        problems.append(
            _invalid("layers_pattern without layers_to_transform", "give layers_to_transform too")
        )
    return problems


def _harmless_settings(config: dict[str, Any]) -> list[str]:
    """The settings that were read and have no effect on what is served, each with the reason."""
    return [
        f"{key}={_shown(config[key])}: {reason}"
        for key, reason in HARMLESS.items()
        if not _is_off(config.get(key)) and config.get(key) != 0
    ]
