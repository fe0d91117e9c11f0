"""The GPUs that a plan knows, as their data sheets give them, and any other machine by its rates.

Rates are peaks: dense 16-bit tensor arithmetic with fp32 sums, no sparsity. docs/planning.md has
the sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

GIGA, TERA, MIB = 10**9, 10**12, 2**20


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device, or one machine that computes without one."""

    name: str
    memory_bytes: int
    bytes_per_second: float  # between memory and the chip
    flops_per_second: float  # dense products of 16-bit numbers
    cache_bytes: int  # the last level of cache that the whole chip shares


def _gpu(name: str, memory_gb: int, gb_per_second: float, tflops: float, mib: int) -> Hardware:
    return Hardware(
        name, memory_gb * GIGA, gb_per_second * GIGA, tflops * TERA, cache_bytes=mib * MIB
    )


GPUS = {
    "a10g": _gpu("NVIDIA A10G", 24, 600, 70, 6),
    "l4": _gpu("NVIDIA L4", 24, 300, 121, 48),
    "l40s": _gpu("NVIDIA L40S", 48, 864, 362, 96),
    "rtx-4090": _gpu("NVIDIA GeForce RTX 4090", 24, 1008, 165.2, 72),
    "a100-40": _gpu("NVIDIA A100 SXM 40 GB", 40, 1555, 312, 40),
    "a100-80": _gpu("NVIDIA A100 SXM 80 GB", 80, 2039, 312, 40),
    "h100": _gpu("NVIDIA H100 SXM", 80, 3350, 989, 50),
    "h200": _gpu("NVIDIA H200 SXM", 141, 4800, 989, 50),
    "b200": _gpu("NVIDIA B200", 180, 8000, 2250, 126),
    "mi300x": _gpu("AMD Instinct MI300X", 192, 5300, 1307, 256),
}
"""By the name that `--gpu` takes."""


def find_hardware(
    name: str,
    *,
    memory_gb: float | None = None,
    bandwidth_gb: float | None = None,
    tflops: float | None = None,
    cache_mib: float | None = None,
) -> Hardware:
    """The GPU called `name`, with what is given in place of its own; or any machine, all given.

    Units: 10^9 bytes, 10^9 bytes a second, 10^12 operations a second, 2^20 bytes. A machine that
    is not in GPUS has no cache unless it is given. Raises ValueError for an unknown name of which
    memory, bandwidth or arithmetic rate is not given, and for a number that is none of a machine.
    """
    for flag, value in (
        ("--memory", memory_gb),
        ("--bandwidth", bandwidth_gb),
        ("--tflops", tflops),
    ):
        if value is not None and not 0 < value < inf:
            raise ValueError(f"{flag} is {value}: give a positive number")
    if cache_mib is not None and not 0 <= cache_mib < inf:
        raise ValueError(f"--cache is {cache_mib}: give 0 or a positive number")
    known = GPUS.get(name.lower())
    if known is not None:
        name, memory, rate = known.name, known.memory_bytes, known.bytes_per_second
        flops, cache = known.flops_per_second, known.cache_bytes
    elif memory_gb is None or bandwidth_gb is None or tflops is None:
        raise ValueError(
            f"gpu {name!r} is not known: name one of {', '.join(GPUS)}, or describe it with "
            "--memory, --bandwidth and --tflops"
        )
    else:
        memory, rate, flops, cache = 0, 0.0, 0.0, 0
    return Hardware(
        name=name,
        memory_bytes=memory if memory_gb is None else round(memory_gb * GIGA),
        bytes_per_second=rate if bandwidth_gb is None else bandwidth_gb * GIGA,
        flops_per_second=flops if tflops is None else tflops * TERA,
        cache_bytes=cache if cache_mib is None else round(cache_mib * MIB),
    )
