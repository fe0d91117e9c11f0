"""How the compiled kernels run: one OpenMP pool shared with torch, compiled code kept on disk.

torch and numba each bring an OpenMP runtime. Two pools on the same cores spin against each other,
so torch's is made visible to numba's OpenMP layer before that loads; where torch has none of that
name (macOS, Windows), numba chooses its own threading layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch

from kernels.cpu.simd import FAST


def _share_openmp() -> None:
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        numba.config.THREADING_LAYER = "omp"


_share_openmp()


def kernel(function: Callable[..., None]) -> Any:
    """Compile a kernel that splits its work by `numba.prange`; callable with ints and floats.

    Runs without the interpreter lock; its machine code is cached beside the source, or in
    NUMBA_CACHE_DIR.
    """
    return numba.njit(parallel=True, nogil=True, cache=True, fastmath=FAST, boundscheck=False)(
        function
    )


def part(function: Callable[..., Any]) -> Any:
    """Compile what one worker does; called by kernels only."""
    return numba.njit(nogil=True, fastmath=FAST, boundscheck=False, error_model="numpy")(function)


def workers() -> int:
    """How many threads a kernel may use: as many as torch."""
    return torch.get_num_threads()
