"""Reads a PEFT LoRA directory into modules of a base, and says all that is wrong with it.

Knows files, settings and values; nothing of pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters_store.errors import FileRefused
from adapters_store.layout import BaseLayout
from adapters_store.module_checks import (
    coverage_problems,
    rank_problems,
    scaling_problems,
    shape_problems,
    tensor_problems,
)
from adapters_store.number_formats import OVERFLOWS_FROM, SAFETENSORS_NAME, STORED_AS, Bits, widen
from adapters_store.peft_config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    ConfigReading,
    LoraSettings,
    read_config,
)
from adapters_store.report import MAX_LISTED, ModuleReport, Problem, Report, grouped
from adapters_store.safetensors_header import WEIGHTS_FILE, TensorEntry, read_header
from adapters_store.targets import (
    ModuleSettings,
    Place,
    module_name,
    places,
    targeted_modules,
    unused_targets,
)
from adapters_store.tensor_keys import SortedTensors, sort_tensors

PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "adapter_model.ckpt")
CONVERT_PICKLE = (
    "convert it where you trust it: load it with PeftModel.from_pretrained, then "
    "save_pretrained(directory, safe_serialization=True), and upload adapter_model.safetensors"
)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterModule:
    """One module of an adapter, its numbers as they are stored in the file."""

    layer: int
    target: str
    rank: int
    alpha: float
    scaling: float
    a: Bits  # [rank, in_features]
    a_dtype: str  # F32, F16 or BF16
    b: Bits  # [out_features, rank]
    b_dtype: str

    def report(self) -> ModuleReport:
        dtype = self.a_dtype if self.a_dtype == self.b_dtype else f"{self.a_dtype}/{self.b_dtype}"
        name = module_name(self.layer, self.target)
        return ModuleReport(name, self.rank, self.alpha, self.scaling, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterReading:
    """The modules by layer, then target, where the report has no problems; else none."""

    modules: tuple[AdapterModule, ...]
    report: Report


def read_adapter(directory: Path, layout: BaseLayout, max_rank: int) -> AdapterReading:
    """Check the two files in `directory` against the base; never raises for what they hold."""
    missing = missing_files({path.name for path in directory.iterdir()})
    if missing:
        return AdapterReading((), Report(problems=tuple(missing)))
    problems: list[Problem] = []
    config = _read_settings(directory / CONFIG_FILE, problems)
    tensors = _read_tensors(directory / WEIGHTS_FILE, layout, problems)
    warnings: list[Problem] = []
    modules: tuple[AdapterModule, ...] = ()
    if config.settings and tensors:
        targeted = _resolve(config.settings, layout, problems)
        if targeted is not None:
            problems += coverage_problems(tensors, targeted, config.settings)
            problems += shape_problems(tensors, targeted, layout)
            problems += scaling_problems(targeted)
            ranks = {module_name(*place): module.rank for place, module in targeted.items()}
            problems += rank_problems(ranks, max_rank)
            warnings += _base_warnings(config.settings, layout)
        if not problems and targeted:
            modules = tuple(_load(directory / WEIGHTS_FILE, tensors, targeted, layout))
            problems += _value_problems(modules, layout)
    report = _report(config, tensors, modules, problems, warnings)
    return AdapterReading(modules if report.accepted else (), report)


def missing_files(names: set[str]) -> list[Problem]:
    """Problems where one of the two files is not among `names`."""
    problems = []
    if CONFIG_FILE not in names:
        problems.append(
            Problem("missing_file", f"there is no {CONFIG_FILE}", "upload the file beside it")
        )
    pickles = sorted(names.intersection(PICKLES))
    if WEIGHTS_FILE not in names and pickles:
        message = f"{pickles[0]} is a pickle, which can run code when it is read"
        problems.append(Problem("pickle_weights", message, CONVERT_PICKLE))
    elif WEIGHTS_FILE not in names:
        remedy = "upload the directory that PEFT's save_pretrained wrote"
        problems.append(Problem("missing_file", f"there is no {WEIGHTS_FILE}", remedy))
    return problems


def _read_settings(path: Path, problems: list[Problem]) -> ConfigReading:
    try:
        with path.open("rb") as file:
            config = read_config(file.read(MAX_CONFIG_BYTES + 1))
    except FileRefused as refusal:
        config = ConfigReading(None, (refusal.problem,), ())
    problems += config.problems
    return config


def _read_tensors(path: Path, layout: BaseLayout, problems: list[Problem]) -> SortedTensors | None:
    max_tensors = 4 * layout.num_layers * len(layout.targets) + 64
    try:
        tensors = sort_tensors(read_header(path, max_tensors), layout)
    except FileRefused as refusal:
        problems.append(refusal.problem)
        return None
    problems += tensor_problems(tensors, layout)
    return tensors


def _resolve(
    settings: LoraSettings, layout: BaseLayout, problems: list[Problem]
) -> dict[Place, ModuleSettings] | None:
    try:
        return targeted_modules(settings, layout)
    except (re.error, RecursionError, OverflowError, IndexError) as error:
        message = f"{CONFIG_FILE}: a pattern cannot be used: {str(error)[:200]}"
        problems.append(Problem("invalid_config", message, "correct the regular expression"))
        return None


def _base_warnings(settings: LoraSettings, layout: BaseLayout) -> list[Problem]:
    warnings = grouped(
        "unused_targets",
        "target_modules names modules that this base does not have",
        unused_targets(settings, layout),
        "nothing to do if the adapter is for several architectures",
    )
    declared = settings.base_model_name_or_path
    if declared and _last_part(declared) != _last_part(layout.model_name):
        message = f"the adapter was trained on {declared[:120]!r}, this is {layout.model_name!r}"
        remedy = "its shapes fit; check that the weights are the same"
        warnings.append(Problem("other_base_name", message, remedy))
    return warnings


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _load(
    path: Path,
    tensors: SortedTensors,
    targeted: dict[Place, ModuleSettings],
    layout: BaseLayout,
) -> Iterator[AdapterModule]:
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    for layer, target in places(layout):
        halves = tensors.modules.get((layer, target))
        if halves is None or halves.a is None or halves.b is None:
            continue
        settings = targeted[layer, target]
        yield AdapterModule(
            layer,
            target,
            settings.rank,
            settings.alpha,
            settings.scaling,
            _tensor(raw, halves.a),
            halves.a.dtype,
            _tensor(raw, halves.b),
            halves.b.dtype,
        )


def _tensor(raw: NDArray[np.uint8], entry: TensorEntry) -> Bits:
    return raw[entry.begin : entry.end].view(STORED_AS[entry.dtype]).reshape(entry.shape)


def _value_problems(modules: tuple[AdapterModule, ...], layout: BaseLayout) -> list[Problem]:
    """NaN and Inf, and numbers past the range of the dtype that rows are packed in."""
    not_finite, too_large = [], []
    overflow = OVERFLOWS_FROM[SAFETENSORS_NAME[layout.dtype]]
    for module in modules:
        name = module_name(module.layer, module.target)
        for half, stored, dtype in (
            ("lora_A", module.a, module.a_dtype),
            ("lora_B", module.b, module.b_dtype),
        ):
            peak = float(np.abs(widen(stored, dtype)).max())
            if not np.isfinite(peak):
                not_finite.append(f"{name}.{half}")
            elif peak >= overflow:
                too_large.append(f"{name}.{half} reaches {peak:g}")
    return [
        *grouped(
            "not_finite",
            f"{len(not_finite)} tensors hold NaN or infinity",
            not_finite,
            "the training diverged: use an earlier checkpoint",
        ),
        *grouped(
            "overflow",
            f"{len(too_large)} tensors hold numbers past the range of {layout.dtype}",
            too_large,
            "serve with dtype bfloat16 or float32, or train with a larger lora_alpha",
        ),
    ]


def _report(
    config: ConfigReading,
    tensors: SortedTensors | None,
    modules: tuple[AdapterModule, ...],
    problems: list[Problem],
    warnings: list[Problem],
) -> Report:
    tensors = tensors or SortedTensors()
    unmatched = [*tensors.unmatched, *tensors.past_last_layer, *tensors.duplicates]
    return Report(
        problems=tuple(problems),
        warnings=tuple(warnings),
        harmless_settings=config.harmless,
        declared_base=config.settings.base_model_name_or_path if config.settings else None,
        use_rslora=config.settings.use_rslora if config.settings else False,
        num_tensors=tensors.num_matched + len(unmatched) + len(tensors.unsupported),
        num_matched=tensors.num_matched,
        num_unmatched=len(unmatched),
        unmatched=tuple(unmatched[:MAX_LISTED]),
        unsupported=tuple(tensors.unsupported[:MAX_LISTED]),
        modules=tuple(module.report() for module in modules),
    )
