"""The packed form of an adapter for one base layout, and its file.

The file is safetensors: `pages` [num_pages, page_elements] in the layout's dtype, zero where no
row lies; `row_ptr` [num_layers * num_targets + 1] int32; `row_offset` [num_rows] int64, elements
from the start of `pages`, multiples of 8; `row_scale` [num_rows] fp32, which is not multiplied
into the weights. Rows are in order of (layer, target, i), as `kernels.layout.RankRows` wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from adapters_store.layout import BaseLayout
from adapters_store.number_formats import SAFETENSORS_NAME, STORED_AS, Bits, narrow, widen
from adapters_store.packing import Packing, pack_rows, row_sizes
from adapters_store.reading import AdapterModule
from kernels.layout import aligned

FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterImage:
    """An adapter packed for one layout.

    Rows of (layer, target t) are row_ptr[layer * num_targets + t] and the ones up to the next
    entry; row i's `a` begins at row_offset[i], its `b` at row_offset[i] + aligned(in_features).
    """

    pages: Bits  # [num_pages, page_elements]
    row_ptr: NDArray[np.int32]  # [num_layers * num_targets + 1]
    row_offset: NDArray[np.int64]  # [num_rows]
    row_scale: NDArray[np.float32]  # [num_rows]


def plan_image(layout: BaseLayout, modules: Sequence[AdapterModule]) -> Packing:
    """Where the rows of these modules go, without moving any weight."""
    ranks = {(module.layer, module.target): module.rank for module in modules}
    return pack_rows(row_sizes(layout, ranks), layout.page_elements)


def build_image(
    layout: BaseLayout, modules: Sequence[AdapterModule], packing: Packing
) -> AdapterImage:
    """Copy the modules' rows, rounded to the layout's dtype, to where `packing` puts them."""
    dtype = SAFETENSORS_NAME[layout.dtype]
    pages = np.zeros((packing.num_pages, layout.page_elements), STORED_AS[dtype])
    flat = pages.reshape(-1)
    row_offset = np.array(packing.row_offset, np.int64)
    row_scale = np.empty(len(row_offset), np.float32)
    num_rows = np.zeros(layout.num_layers * len(layout.targets) + 1, np.int32)
    column = {target.name: t for t, target in enumerate(layout.targets)}
    row = 0
    for module in modules:
        a = narrow(widen(module.a, module.a_dtype), dtype)
        b = narrow(widen(np.ascontiguousarray(module.b.T), module.b_dtype), dtype)
        num_rows[module.layer * len(layout.targets) + column[module.target] + 1] = module.rank
        row_scale[row : row + module.rank] = module.scaling
        b_start = aligned(a.shape[1])
        for i, offset in enumerate(row_offset[row : row + module.rank].tolist()):
            flat[offset : offset + a.shape[1]] = a[i]
            flat[offset + b_start : offset + b_start + b.shape[1]] = b[i]
        row += module.rank
    return AdapterImage(pages, np.cumsum(num_rows, dtype=np.int32), row_offset, row_scale)


def write_image(path: Path, image: AdapterImage, layout: BaseLayout, digest: str) -> None:
    """Write the file at `path`; its metadata name the digest, the layout and the format."""
    tensors = {
        "pages": (image.pages, layout.dtype),
        "row_ptr": (image.row_ptr, "int32"),
        "row_offset": (image.row_offset, "int64"),
        "row_scale": (image.row_scale, "float32"),
    }
    specs = {
        name: TensorSpec(
            dtype=dtype, shape=tensor.shape, data_ptr=tensor.ctypes.data, data_len=tensor.nbytes
        )
        for name, (tensor, dtype) in tensors.items()
    }
    metadata = {"digest": digest, "layout": layout.key, "format_version": FORMAT_VERSION}
    serialize_file(specs, path, metadata=metadata)
