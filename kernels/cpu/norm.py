"""RMSNorm, alone and with the residual addition before it."""

from __future__ import annotations

import numpy as np
from numba import prange

from kernels.cpu.runtime import kernel, part
from kernels.cpu.simd import (
    add,
    elements,
    fma,
    load,
    load_part,
    mul,
    splat,
    store,
    store_part,
    total,
    zero,
)


@part
def normalise(out, out_at, x, x_at, weight, width, eps):
    """out[out_at:][:width] = x / rms(x) · weight, for x[x_at:][:width]; out may be x."""
    full, rest = width // 16 * 16, width % 16
    squares = zero()
    for i in range(0, full, 16):
        v = load(x, x_at + i)
        squares = fma(v, v, squares)
    if rest:
        v = load_part(x, x_at + full, rest)
        squares = fma(v, v, squares)
    mean = total(squares) / np.float32(width)
    scale = splat(np.float32(1.0) / np.sqrt(mean + np.float32(eps)))
    for i in range(0, full, 16):
        store(out, out_at + i, mul(mul(load(x, x_at + i), scale), load(weight, i)))
    if rest:
        v = mul(mul(load_part(x, x_at + full, rest), scale), load_part(weight, full, rest))
        store_part(out, out_at + full, v, rest)


@part
def accumulate(residual, x, at, width):
    """residual[at:][:width] += x[at:][:width]."""
    full, rest = width // 16 * 16, width % 16
    for i in range(at, at + full, 16):
        store(residual, i, add(load(residual, i), load(x, i)))
    if rest:
        i = at + full
        store_part(residual, i, add(load_part(residual, i, rest), load_part(x, i, rest)), rest)


@kernel
def rms_norm(kind, out, x, weight, num_tokens, width, eps):
    """Addresses of out, x [num_tokens, width] and weight [width]; kind as in `simd.elements`."""
    for t in prange(num_tokens):
        source, scale = elements(x, kind), elements(weight, kind)
        normalise(elements(out, kind), t * width, source, t * width, scale, width, eps)


@kernel
def add_rms_norm(kind, out, x, residual, weight, num_tokens, width, eps):
    """As `rms_norm` of residual, to which x is added first."""
    for t in prange(num_tokens):
        source, scale = elements(residual, kind), elements(weight, kind)
        accumulate(source, elements(x, kind), t * width, width)
        normalise(elements(out, kind), t * width, source, t * width, scale, width, eps)
