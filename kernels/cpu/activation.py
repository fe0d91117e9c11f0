"""SiLU of the gate times up."""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    add,
    div,
    elements,
    exp,
    load,
    load_part,
    mul,
    splat,
    store,
    store_part,
    sub,
    zero,
)


@part
def _gated(gate, up):
    return mul(div(gate, add(splat(np.float32(1.0)), exp(sub(zero(), gate)))), up)


@part
def _row(out, out_at, gate_up, at, width):
    full, rest = width // 16 * 16, width % 16
    for i in range(0, full, 16):
        store(out, out_at + i, _gated(load(gate_up, at + i), load(gate_up, at + width + i)))
    if rest:
        gate = load_part(gate_up, at + full, rest)
        up = load_part(gate_up, at + width + full, rest)
        store_part(out, out_at + full, _gated(gate, up), rest)


@kernel
def silu_mul(kind, out, gate_up, num_tokens, width):
    """Addresses of out [num_tokens, width] and gate_up [num_tokens, 2 · width]."""
    for t in prange(num_tokens):
        _row(elements(out, kind), t * width, elements(gate_up, kind), 2 * t * width, width)
