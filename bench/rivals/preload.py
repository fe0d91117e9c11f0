"""The libraries that vLLM's manual advises to preload on x86: Intel's OpenMP and tcmalloc."""

from __future__ import annotations

import shutil

from bench.rivals.environments import VLLM, run

PACKAGE = "libtcmalloc-minimal4"
TCMALLOC = VLLM.directory / "tcmalloc"


def unpack_tcmalloc() -> None:
    """Unpack Debian's tcmalloc beside the environment; where there is no apt-get, say so."""
    if TCMALLOC.is_dir():
        print(f"{TCMALLOC} is there", flush=True)
    elif shutil.which("apt-get") is None:
        print("vllm: there is no apt-get, so tcmalloc is not preloaded", flush=True)
    else:
        run(["apt-get", "download", PACKAGE], VLLM.directory)
        (archive,) = VLLM.directory.glob(f"{PACKAGE}_*.deb")
        run(["dpkg-deb", "--extract", str(archive), str(TCMALLOC)])


def preloaded() -> str:
    """The value of LD_PRELOAD: those of the two that are there."""
    found = [*TCMALLOC.rglob("libtcmalloc_minimal.so.4")]
    found += (VLLM.directory / "venv" / "lib").glob("libiomp5.so")
    return ":".join(str(path) for path in found)
