"""Runs the check of a stranger's files in a process of its own, bounded in time and memory.

`python -m adapters_store.admission` is that process: a request as JSON on its standard input, an
answer as JSON on its standard output. It imports no torch, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from adapters_store.errors import AdmissionFailed, ArchiveRefused
from adapters_store.layout import BaseLayout
from adapters_store.report import Problem, Report

TIMEOUT_SECONDS = 120.0
SPARE_MEMORY_BYTES = 2 << 30
"""Address space of the checking process beside what the adapter's own size explains."""

_MODULE = "adapters_store.admission"


class CheckRequest(msgspec.Struct, frozen=True, tag=True):
    """Check an adapter directory, and write its image if image_path is given."""

    directory: str
    layout: BaseLayout
    max_rank: int
    max_pages: int | None = None
    image_path: str | None = None


class ExtractRequest(msgspec.Struct, frozen=True, tag=True):
    """Take the two files of an adapter out of an archive."""

    archive: str
    directory: str
    max_bytes: int


@dataclass(frozen=True, slots=True)
class _Envelope:
    """What the parent sends: the request and the child's limits."""

    request: CheckRequest | ExtractRequest
    max_memory_bytes: int
    max_cpu_seconds: int  # ends the child by itself where the server is gone


def check(
    directory: Path,
    layout: BaseLayout,
    *,
    max_rank: int,
    max_pages: int | None = None,
    image_path: Path | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Report:
    """Report on the adapter in `directory`, as `checking.check_adapter` does, in a child process.

    A check that takes too long, too much memory or kills its process is a refusal like any
    other. Raises AdmissionFailed where the process could not do its work.
    """
    weights_bytes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    request = CheckRequest(
        str(directory.absolute()),
        layout,
        max_rank,
        max_pages,
        str(image_path.absolute()) if image_path else None,
    )
    # The file is mapped once; its rows are packed, and widened module by module.
    max_memory_bytes = SPARE_MEMORY_BYTES + 6 * weights_bytes
    try:
        answer = _run(request, max_memory_bytes, timeout_seconds)
        return msgspec.json.decode(answer, type=Report)
    except _CheckEnded as ended:
        return Report(problems=(ended.problem,), file_bytes=weights_bytes)


def extract(
    archive: Path,
    directory: Path,
    *,
    max_bytes: int,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> None:
    """Take an adapter's two files out of an archive, as `archive.extract` does, in a child process.

    Raises ArchiveRefused, or AdmissionFailed where the process could not do its work.
    """
    request = ExtractRequest(str(archive.absolute()), str(directory.absolute()), max_bytes)
    try:
        answer = _run(request, SPARE_MEMORY_BYTES, timeout_seconds)
    except _CheckEnded as ended:
        raise ArchiveRefused(ended.problem) from ended
    problem = msgspec.json.decode(answer, type=Problem | None)
    if problem is not None:
        raise ArchiveRefused(problem)


class _CheckEnded(Exception):
    """The child ended without an answer because of what the file made it do."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def _run(
    request: CheckRequest | ExtractRequest, max_memory_bytes: int, timeout_seconds: float
) -> bytes:
    envelope = _Envelope(request, max_memory_bytes, math.ceil(timeout_seconds) + 1)
    try:
        # One BLAS thread: more would take the server's cores, and address space for each.
        child = subprocess.run(
            [sys.executable, "-m", _MODULE],
            input=msgspec.json.encode(envelope),
            capture_output=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise _CheckEnded(_timed_out(timeout_seconds)) from expired
    if child.returncode == 0:
        return child.stdout
    if child.returncode == _EXHAUSTED or -child.returncode in _CRASHES:
        raise _CheckEnded(_exhausted(child.returncode))
    last_lines = child.stderr.decode(errors="replace").strip()[-400:]
    raise AdmissionFailed(
        f"the checking process ended with status {child.returncode}: {last_lines}: "
        "look at the server's disk, memory and installation"
    )


def _timed_out(timeout_seconds: float) -> Problem:
    return Problem(
        "check_timed_out",
        f"the check took longer than {timeout_seconds:g} seconds",
        "use simple expressions in target_modules, rank_pattern and alpha_pattern",
    )


def _exhausted(status: int) -> Problem:
    return Problem(
        "check_failed",
        f"the check used up its memory or crashed (status {status})",
        "save the adapter again with PEFT's save_pretrained",
    )


_EXHAUSTED = 3
_CRASHES = (
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGXCPU,
)


def main() -> int:
    """The child: answer the request on standard input; the exit status says how it went."""
    envelope = msgspec.json.decode(sys.stdin.buffer.read(), type=_Envelope)
    with contextlib.suppress(ValueError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (envelope.max_memory_bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (envelope.max_cpu_seconds,) * 2)
    try:
        sys.stdout.buffer.write(msgspec.json.encode(_answer(envelope.request)))
    except (MemoryError, RecursionError):
        return _EXHAUSTED
    return 0


def _answer(request: CheckRequest | ExtractRequest) -> Report | Problem | None:
    # Imported here: the parent needs neither numpy nor the readers of hostile files.
    if isinstance(request, CheckRequest):
        from adapters_store.checking import check_adapter

        return check_adapter(
            Path(request.directory),
            request.layout,
            max_rank=request.max_rank,
            max_pages=request.max_pages,
            image_path=Path(request.image_path) if request.image_path else None,
        )
    from adapters_store.archive import extract as extract_here

    try:
        extract_here(Path(request.archive), Path(request.directory), max_bytes=request.max_bytes)
    except ArchiveRefused as refusal:
        return refusal.problem
    return None


if __name__ == "__main__":
    sys.exit(main())
