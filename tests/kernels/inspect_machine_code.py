"""What a compiled kernel uses of a GPU, read from its machine code with the tools Triton ships."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10}
"""Shared memory of a multiprocessor; each program takes 1 KiB beside its own."""
REGISTERS, MAX_WARPS, MAX_PROGRAMS = 65536, 64, 32


def inspect_cubin(cubin: bytes, target: str, num_warps: int, shared_bytes: int) -> dict[str, Any]:
    """Registers, local memory, loads by width, tensor-core instructions, occupancy."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run(binaries / "cuobjdump", "-res-usage", str(path))
        sass = run(binaries / "nvdisasm", "-c", str(path))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+", sass)
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": Counter(str(width_of(load)) for load in loads),
        "matrix_instructions": Counter(re.findall(r"\b(HMMA|HGMMA)\b", sass)),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", sass)),
        "resident_warps": resident_warps(target, num_warps, used["REG"], shared_bytes),
    }


def width_of(load: str) -> int:
    """Bits that a thread reads with a load instruction of SASS."""
    widths = [int(part.lstrip("US")) for part in load.split(".") if re.fullmatch(r"[US]?\d+", part)]
    return min((width for width in widths if width in (8, 16, 64, 128)), default=32)


def resident_warps(target: str, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Warps that a multiprocessor holds at once, of 64 (CUDA's occupancy calculation)."""
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // registers_of_warp // 4 * 4 // num_warps
    by_shared = SHARED_BYTES[target] // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_registers, by_shared, MAX_WARPS // num_warps, MAX_PROGRAMS) * num_warps


def inspect_amdgcn(assembly: str) -> dict[str, Any]:
    """The same of AMD's assembly, less the occupancy."""
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\b", assembly)}
    loads = re.findall(
        r"\b(?:global|buffer)_load_(?:u|s)?(dwordx4|dwordx2|short|byte|dword)", assembly
    )
    widths = {"dwordx4": "128", "dwordx2": "64", "dword": "32", "short": "16", "byte": "8"}
    return {
        "registers": used["vgpr_count"],
        "spilled_bytes": used["private_segment_fixed_size"],
        "spill_instructions": used["vgpr_spill_count"],  # scalars spill into vector registers
        "loads": Counter(widths[load] for load in loads),
        "matrix_instructions": Counter(re.findall(r"\bv_(mfma)_", assembly)),
        "atomics": len(re.findall(r"\b(?:global|buffer)_atomic", assembly)),
    }


def run(*command: str | Path) -> str:
    """What a command prints; CalledProcessError when it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
