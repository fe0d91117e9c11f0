"""Copies an adapter's two files into the store's own directory before they are looked at.

What is checked is then what is kept: nobody else can change the copy.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from adapters_store.layout import BaseLayout
from adapters_store.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters_store.reading import missing_files
from adapters_store.report import Problem
from adapters_store.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, WEIGHTS_FILE


def copy_files(source: Path, target: Path, max_weights_bytes: int) -> list[Problem]:
    """Copy the two files from `source` to the new directory `target`, or say why not.

    Links are followed; anything but a regular file of a plausible size is a problem.
    """
    if not source.is_dir():
        message = f"there is no directory {str(source)[:200]!r}"
        return [Problem("missing_file", message, "name a directory with the adapter's two files")]
    problems = missing_files({path.name for path in source.iterdir()})
    if problems:
        return problems
    target.mkdir()
    limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: max_weights_bytes}
    for name, max_bytes in limits.items():
        problems += _copy(source / name, target / name, max_bytes)
    return problems


def max_weights_bytes(layout: BaseLayout, max_rank: int) -> int:
    """Bytes of the largest file that could be accepted: every module at max_rank in fp32."""
    features = sum(target.in_features + target.out_features for target in layout.targets)
    return LENGTH_BYTES + MAX_HEADER_BYTES + 4 * layout.num_layers * features * max_rank


def _copy(source: Path, target: Path, max_bytes: int) -> list[Problem]:
    # Not blocking: opening a pipe would wait for its writer.
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        message = f"{source.name} cannot be read: {error.strerror}"
        return [Problem("missing_file", message, "check the file and its permissions")]
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            message = f"{source.name} is not a regular file"
            return [Problem("missing_file", message, "upload the file itself")]
        if status.st_size > max_bytes:
            message = f"{source.name} has {status.st_size} bytes, the limit here is {max_bytes}"
            remedy = "upload an adapter of this base within the rank limit"
            return [Problem("file_too_large", message, remedy)]
        with target.open("xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    return []
