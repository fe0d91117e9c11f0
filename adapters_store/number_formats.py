"""F32, F16 and BF16 as bits: widening to fp32, and rounding to nearest even.

numpy has no bfloat16; its values are held as uint16 bit patterns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.float32 | np.float16 | np.uint16]
"""Numbers as they are stored: float32, float16, or the bits of bfloat16 as uint16."""

STORED_AS: dict[str, np.dtype[np.float32 | np.float16 | np.uint16]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
"""numpy type that holds each safetensors type."""

SAFETENSORS_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""safetensors' name of each dtype of a base layout."""

UNIT_ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Largest relative error of rounding a normal number to nearest."""

SMALLEST_STEP = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""Distance of the numbers next to zero: twice the largest absolute error near it."""

OVERFLOWS_FROM = {"F32": float("inf"), "F16": 65520.0, "BF16": float.fromhex("0x1.ffp127")}
"""Smallest magnitude that rounds to infinity."""


def widen(stored: Bits, dtype: str) -> NDArray[np.float32]:
    """Numbers of `dtype` as fp32, exactly; any shape."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrow(values: NDArray[np.float32], dtype: str) -> Bits:
    """Finite fp32 values rounded to nearest even in `dtype`; past its range they become inf."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
