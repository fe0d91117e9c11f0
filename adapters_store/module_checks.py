"""What must hold between an adapter's settings, its tensors' shapes and the base."""

from __future__ import annotations

import numpy as np

from adapters_store.layout import BaseLayout, TargetShape
from adapters_store.peft_config import LoraSettings
from adapters_store.report import Problem, grouped
from adapters_store.targets import (
    NOT_SERVED,
    ModuleSettings,
    Place,
    is_targeted,
    module_name,
)
from adapters_store.tensor_keys import ModuleTensors, SortedTensors

_SAVE_AGAIN = "save the whole adapter again with PEFT's save_pretrained"


def tensor_problems(tensors: SortedTensors, layout: BaseLayout) -> list[Problem]:
    """Tensors that belong nowhere, or of a kind that is not served."""
    return [
        *grouped(
            "unsupported_tensors",
            f"{len(tensors.unsupported)} tensors are of a kind that is not served",
            tensors.unsupported,
            "train LoRA on the attention and MLP projections only",
        ),
        *grouped(
            "layer_out_of_range",
            f"{len(tensors.past_last_layer)} tensors are for layers past the last of this base, "
            f"{layout.num_layers - 1}",
            tensors.past_last_layer,
            f"upload an adapter that was trained on {layout.model_name}",
        ),
        *grouped(
            "unmatched_tensors",
            f"{len(tensors.unmatched)} tensors match no module of this base",
            tensors.unmatched,
            "the names must be [base_model.model.]model.layers.N.<module>.lora_A|B.weight, "
            "as PEFT writes them for the causal language model",
        ),
        *grouped(
            "duplicate_tensors",
            "tensors are there twice under two spellings",
            tensors.duplicates,
            _SAVE_AGAIN,
        ),
    ]


def coverage_problems(
    tensors: SortedTensors, targeted: dict[Place, ModuleSettings], settings: LoraSettings
) -> list[Problem]:
    """The modules that the settings target and those that have both tensors must be the same."""
    found = tensors.modules
    halves = [
        f"{module_name(*place)} has no lora_{'B' if half.b is None else 'A'}"
        for place, half in found.items()
        if half.a is None or half.b is None
    ]
    unserved = [name for name in NOT_SERVED if is_targeted(settings, name)]
    problems = [
        *grouped("missing_half", "modules have one tensor of two", halves, _SAVE_AGAIN),
        *grouped(
            "unsupported_target",
            f"target_modules {_shown_targets(settings)} reach the embedding or the head",
            unserved,
            "target the attention and MLP projections only",
        ),
        *grouped(
            "missing_tensors",
            "the settings target modules of this base that have no tensors in the file",
            [module_name(*place) for place in targeted if place not in found],
            "upload the complete file for this base, or correct target_modules",
        ),
        *grouped(
            "tensors_not_targeted",
            "the file has tensors of modules that the settings do not target",
            [module_name(*place) for place in found if place not in targeted],
            "upload the adapter_config.json that belongs to these weights",
        ),
    ]
    if not found and not problems:
        problems = grouped(
            "empty_adapter", "the adapter changes no module", ["0 tensors"], _SAVE_AGAIN
        )
    return problems


def shape_problems(
    tensors: SortedTensors, targeted: dict[Place, ModuleSettings], layout: BaseLayout
) -> list[Problem]:
    """lora_A must be [rank, in_features] and lora_B [out_features, rank]."""
    shapes = {shape.name: shape for shape in layout.targets}
    wrong_base: list[str] = []
    wrong_rank: list[str] = []
    for place, settings in targeted.items():
        if halves := tensors.modules.get(place):
            base, rank = _shape_mismatches(module_name(*place), halves, shapes[place[1]], settings)
            wrong_base += base
            wrong_rank += rank
    return [
        *grouped(
            "wrong_shape",
            f"{len(wrong_base)} tensors do not fit {layout.model_name}",
            wrong_base,
            f"upload an adapter that was trained on {layout.model_name}",
        ),
        *grouped(
            "wrong_rank",
            f"{len(wrong_rank)} tensors have another rank than the settings say",
            wrong_rank,
            "upload the adapter_config.json that belongs to these weights (r, rank_pattern)",
        ),
    ]


def _shape_mismatches(
    name: str, halves: ModuleTensors, target: TargetShape, settings: ModuleSettings
) -> tuple[list[str], list[str]]:
    wrong_base, wrong_rank = [], []
    for half, entry, features, axis in (
        ("lora_A", halves.a, target.in_features, 1),
        ("lora_B", halves.b, target.out_features, 0),
    ):
        if entry is None:
            continue
        shape = list(entry.shape)
        if len(shape) != 2 or shape[axis] != features:
            wanted = [settings.rank, features] if axis == 1 else [features, settings.rank]
            wrong_base.append(f"{name}.{half} is {shape} and should be {wanted}")
        elif shape[1 - axis] != settings.rank:
            wrong_rank.append(
                f"{name}.{half} has rank {shape[1 - axis]}, the settings say {settings.rank}"
            )
    return wrong_base, wrong_rank


def scaling_problems(targeted: dict[Place, ModuleSettings]) -> list[Problem]:
    """Scalings must be finite in fp32, and zero only where they are zero."""
    bad = []
    for place, settings in targeted.items():
        with np.errstate(over="ignore", under="ignore"):
            scaling = float(np.float32(settings.scaling))
        if not np.isfinite(scaling) or (scaling == 0) != (settings.scaling == 0):
            bad.append(f"{module_name(*place)} has scaling {settings.scaling:g}")
    return grouped(
        "bad_scaling",
        "scalings are outside of what fp32 can hold",
        bad,
        "use an ordinary lora_alpha",
    )


def rank_problems(ranks: dict[str, int], max_rank: int) -> list[Problem]:
    """Modules, by name, with a rank above the server's limit."""
    return grouped(
        "rank_too_high",
        f"modules have a rank above the limit of {max_rank}",
        [f"{name} has rank {rank}" for name, rank in ranks.items() if rank > max_rank],
        f"train with a rank of at most {max_rank}, or raise the server's max_adapter_rank",
    )


def _shown_targets(settings: LoraSettings) -> str:
    return repr(settings.target_modules)[:80]
