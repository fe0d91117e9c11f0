"""Proves a packed image: the product with its rows against the dense product, for random x.

Two bounds, element by element: the product of the saved tensors may differ by what rounding them
to the layout's dtype can explain; that of the rounded tensors only by fp64's own rounding. One
wrong number, a row at a wrong place, a lost one or a wrong scale is far outside of the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adapters_store.image import AdapterImage
from adapters_store.layout import BaseLayout, TargetShape
from adapters_store.number_formats import (
    SAFETENSORS_NAME,
    SMALLEST_STEP,
    UNIT_ROUNDOFF,
    narrow,
    widen,
)
from adapters_store.reading import AdapterModule
from adapters_store.report import SelfCheck
from kernels.layout import aligned

Vector = NDArray[np.float64]
Matrix = NDArray[np.float32]

LARGEST_RATIO = 1e300
"""Stands for infinity, which JSON does not have."""


def check_image(
    image: AdapterImage, modules: Sequence[AdapterModule], layout: BaseLayout, seed: int = 0
) -> SelfCheck:
    """Compare Σ scaleᵢ bᵢ (aᵢ·x) of the image with scaling · B (A x) of the saved tensors, fp64.

    Modules that the adapter does not change must have no rows: their bound ratio is
    LARGEST_RATIO otherwise.
    """
    random = np.random.default_rng(seed)
    by_place = {(module.layer, module.target): module for module in modules}
    largest_error = largest_dense = largest_ratio = 0.0
    for layer in range(layout.num_layers):
        for t, target in enumerate(layout.targets):
            x = random.standard_normal(target.in_features)
            packed = _packed_product(image, layout, layer * len(layout.targets) + t, target, x)
            module = by_place.get((layer, target.name))
            if module is None:
                largest_ratio = max(largest_ratio, LARGEST_RATIO if packed.any() else 0.0)
                continue
            dense, *bounds = _expected(module, x, SAFETENSORS_NAME[layout.dtype])
            largest_error = max(largest_error, float(np.abs(packed - dense).max()))
            largest_dense = max(largest_dense, float(np.abs(dense).max()))
            ratios = [_bound_ratio(packed, expected, bound) for expected, bound in bounds]
            largest_ratio = max(largest_ratio, *ratios)
    relative = largest_error / largest_dense if largest_dense else largest_error
    return SelfCheck(relative, largest_ratio)


def _packed_product(
    image: AdapterImage, layout: BaseLayout, place: int, target: TargetShape, x: Vector
) -> Vector:
    """Follow row_ptr, row_offset and row_scale as the kernels do; returns [out_features]."""
    rows = slice(image.row_ptr[place], image.row_ptr[place + 1])
    offsets = image.row_offset[rows, None]
    flat, dtype = image.pages.reshape(-1), SAFETENSORS_NAME[layout.dtype]
    b_offsets = offsets + aligned(target.in_features)
    a = widen(flat[offsets + np.arange(target.in_features)], dtype).astype(np.float64)
    b = widen(flat[b_offsets + np.arange(target.out_features)], dtype).astype(np.float64)
    product: Vector = (image.row_scale[rows] * (a @ x)) @ b
    return product


def _expected(
    module: AdapterModule, x: Vector, dtype: str
) -> tuple[Vector, tuple[Vector, Vector], tuple[Vector, Vector]]:
    """The dense product, then it and the product of the rounded tensors, each with its bound."""
    a, b = widen(module.a, module.a_dtype), widen(module.b, module.b_dtype)
    a_rounded, b_rounded = widen(narrow(a, dtype), dtype), widen(narrow(b, dtype), dtype)
    saved = _product(a, b, module.scaling, x, UNIT_ROUNDOFF[dtype], SMALLEST_STEP[dtype])
    return saved[0], saved, _product(a_rounded, b_rounded, module.scaling, x, 0.0, 0.0)


def _product(
    a32: Matrix, b32: Matrix, scaling: float, x: Vector, roundoff: float, step: float
) -> tuple[Vector, Vector]:
    """scaling · B (A x), and how far it moves when each number of A and B is rounded.

    roundoff, step: relative and absolute size of that rounding. The scale's rounding to fp32 and
    the sums' in fp64 are always allowed for.
    """
    a, b = a32.astype(np.float64), b32.astype(np.float64)
    product = scaling * (b @ (a @ x))
    sums = (a.shape[0] + a.shape[1] + 8) * 2.0**-51
    relative = (1 + roundoff) ** 2 * (1 + 2.0**-23) - 1 + sums
    magnitude = np.abs(b) @ (np.abs(a) @ np.abs(x))
    moved = (np.abs(b) + step) @ ((np.abs(a) + step) @ np.abs(x)) if step else magnitude
    return product, abs(scaling) * (relative * moved + (moved - magnitude))


def _bound_ratio(packed: Vector, expected: Vector, bound: Vector) -> float:
    # The smallest positive number keeps 0 / 0 at 0.
    with np.errstate(over="ignore"):
        ratio = np.abs(packed - expected) / np.maximum(bound, np.finfo(np.float64).tiny)
    return min(float(ratio.max()), LARGEST_RATIO)
