"""How the compiled kernels run: one OpenMP pool shared with torch, compiled code kept on disk.

torch and numba each bring an OpenMP runtime. Two pools on the same cores spin against each other,
so torch's is made visible to numba's OpenMP layer before that loads; where torch has none of that
name (macOS, Windows), numba chooses its own threading layer.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import torch

from kernels.cpu.simd import FAST


def _share_openmp() -> None:
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        numba.config.THREADING_LAYER = "omp"


def _keep_compiled_code() -> None:
    """Give numba a cache directory for these very sources.

    numba looks at a kernel's own file only: after a change of a function that it calls, from
    another file, it would go on with the old machine code.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    chosen = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    root = Path(chosen) if chosen else Path.home() / ".cache"
    directory = root / "manylora" / f"kernels-{digest.hexdigest()[:16]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to: compiled anew at each start
        directory = Path(tempfile.mkdtemp(prefix="manylora-kernels-"))
    numba.config.CACHE_DIR = str(directory)


_share_openmp()
_keep_compiled_code()


def kernel(function: Callable[..., None]) -> Any:
    """Compile a kernel that splits its work by `numba.prange`; callable with ints and floats.

    Runs without the interpreter lock; its machine code is kept under NUMBA_CACHE_DIR,
    XDG_CACHE_HOME or ~/.cache.
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


@functools.cache
def has_features(*names: str) -> bool:
    """Whether this machine's processor has all of these instruction sets, by LLVM's names."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in names)
