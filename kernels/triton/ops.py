"""The Triton implementation of the public operations; imports no driver and needs no GPU to load.

What each operation means is said in `kernels.reference`; the files beside this one say how
their kernels compute it.
"""

from kernels.triton.activation import silu_mul
from kernels.triton.adapters import add_adapters
from kernels.triton.attention import paged_attention
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.rope import rope_store_kv

__all__ = [
    "add_adapters",
    "add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rope_store_kv",
    "silu_mul",
]
