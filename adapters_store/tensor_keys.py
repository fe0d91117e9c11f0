"""Names of tensors in an adapter file: which half of which module each one is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from adapters_store.layout import TARGET_PATHS, BaseLayout
from adapters_store.safetensors_header import TensorEntry
from adapters_store.targets import Place

_TARGET_OF_PATH = {path: target for target, path in TARGET_PATHS.items()}
_KEY = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    rf"(?P<path>{'|'.join(map(re.escape, _TARGET_OF_PATH))})"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
_UNSUPPORTED = re.compile(
    r"lora_magnitude_vector|lora_embedding_[AB]|embed_tokens|lm_head|modules_to_save|"
    r"trainable_tokens|token_adapter|lora_velora|lora_diag|prompt_embeddings|\.bias$|"
    r"ia3_|hada_|lokr_|lora_E$|vera_lambda"
)


@dataclass(slots=True)
class ModuleTensors:
    """The two halves of one module, as far as the file has them."""

    a: TensorEntry | None = None  # lora_A [rank, in_features]
    b: TensorEntry | None = None  # lora_B [out_features, rank]


@dataclass(slots=True)
class SortedTensors:
    """Every tensor of a file in exactly one of these."""

    modules: dict[Place, ModuleTensors] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)  # known kinds that are not served
    past_last_layer: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)  # a half under a second spelling

    @property
    def num_matched(self) -> int:
        """Tensors that are a half of a module of the base."""
        return sum(
            (halves.a is not None) + (halves.b is not None) for halves in self.modules.values()
        )


def sort_tensors(entries: list[TensorEntry], layout: BaseLayout) -> SortedTensors:
    """Sort the tensors by what their names say; shapes are not looked at."""
    tensors = SortedTensors()
    for entry in entries:
        match = _KEY.fullmatch(entry.name)
        if match is None:
            is_known = _UNSUPPORTED.search(entry.name) is not None
            (tensors.unsupported if is_known else tensors.unmatched).append(entry.name)
        elif int(match["layer"]) >= layout.num_layers:
            tensors.past_last_layer.append(entry.name)
        else:
            place = (int(match["layer"]), _TARGET_OF_PATH[match["path"]])
            _put(tensors, place, match["half"], entry)
    return tensors


def _put(tensors: SortedTensors, place: Place, half: str, entry: TensorEntry) -> None:
    halves = tensors.modules.setdefault(place, ModuleTensors())
    attribute = half.lower()
    if getattr(halves, attribute) is not None:
        tensors.duplicates.append(entry.name)
    else:
        setattr(halves, attribute, entry)
