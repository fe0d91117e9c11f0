"""Builds llama.cpp's server from the sources in llama-cpp-python's source distribution.

For this processor (-march=native, with AVX512-BF16 where the compiler finds it), with OpenMP and
llamafile's matrix products, as llama.cpp does by default; and converts the adapters to GGUF.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path

from bench.rivals.environments import LLAMACPP, RivalError, run
from bench.rivals.model_files import (
    MODEL,
    MODELS,
    NUM_ADAPTERS,
    adapter_directory,
    adapter_name,
    write_once,
)

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SOURCE = LLAMACPP.directory / "source"
LLAMA = SOURCE / "vendor" / "llama.cpp"
BUILD = LLAMACPP.directory / "build"
SERVER = LLAMACPP.directory / "llama-server"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "GGML_AVX512_BF16": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def adapter_gguf(index: int) -> Path:
    """An adapter as llama.cpp reads it."""
    return MODELS / f"{adapter_name(index)}.gguf"


def build_llamacpp() -> None:
    """Sources, server and adapters, unless they are there. Building takes tens of minutes."""
    if shutil.which("c++") is None:
        raise RivalError("llamacpp: a C++ compiler is needed, and there is no c++: install g++")
    write_once(SOURCE, _unpack)
    write_once(SERVER, _build)
    converter = str(LLAMA / "convert_lora_to_gguf.py")
    for index in range(NUM_ADAPTERS):
        write_once(adapter_gguf(index), partial(_convert, converter, adapter_directory(index)))


def _unpack(directory: Path) -> None:
    download = [str(LLAMACPP.python), "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    run([*download, "--dest", str(LLAMACPP.directory), f"{PACKAGE}=={VERSION}"])
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}"
    with tarfile.open(LLAMACPP.directory / f"{name}.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    unpacked = directory / name
    for path in unpacked.iterdir():
        path.rename(directory / path.name)
    unpacked.rmdir()


def _build(server: Path) -> None:
    cmake = str(LLAMACPP.python.with_name("cmake"))
    ninja = f"-DCMAKE_MAKE_PROGRAM={LLAMACPP.python.with_name('ninja')}"
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    run([cmake, "-G", "Ninja", ninja, *options, "-S", str(LLAMA), "-B", str(BUILD)])
    jobs = f"-j{os.cpu_count() or 1}"
    run([cmake, "--build", str(BUILD), "--target", "llama-server", jobs])
    shutil.copy2(BUILD / "bin" / "llama-server", server)


def _convert(converter: str, adapter: Path, path: Path) -> None:
    """By llama.cpp's own script, which needs torch and transformers: ours do."""
    options = ["--base", str(MODEL), "--outtype", "bf16", "--outfile", str(path)]
    run([sys.executable, converter, *options, str(adapter)])
