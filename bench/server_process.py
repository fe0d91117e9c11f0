"""A real `manylora serve` on 127.0.0.1 and a free port, from its start to its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.record import ROOT, peak_bytes
from server.config import Settings

READY_SECONDS = 600.0
STOP_SECONDS = 20.0
LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that is ready."""

    url: str
    pid: int
    start_seconds: float  # from the start of the command to the first 200 of /ready

    def peak_bytes(self) -> int | None:
        """Sum over its processes of the most memory each had resident; None if not told here."""
        parent = psutil.Process(self.pid)
        found = [peak_bytes(process.pid) for process in [parent, *parent.children(recursive=True)]]
        known = [peak for peak in found if peak is not None]
        return sum(known) if known else None

    def cpu_seconds(self) -> float:
        """User and system time of its processes so far."""
        parent = psutil.Process(self.pid)
        times = [p.cpu_times() for p in [parent, *parent.children(recursive=True)]]
        return float(sum(t.user + t.system for t in times))


@contextmanager
def server_process(settings: Settings, log: Path) -> Iterator[ServerProcess]:
    """Start a server, wait until it is ready, end it afterwards; its output goes to `log`.

    Raises RuntimeError with the end of its output when it ends before that, or takes too long.
    """
    port = _free_port()
    given = settings.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    variables = {
        f"MANYLORA_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in {**given, "host": "127.0.0.1", "port": port}.items()
    }
    clean = {name: v for name, v in os.environ.items() if not name.startswith("MANYLORA_")}
    command = [sys.executable, "-m", "server.cli", "serve"]
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean | variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(process, url, began, log)
        yield ServerProcess(url, process.pid, time.perf_counter() - began)
    finally:
        _stop(process)


def _await_ready(process: subprocess.Popen[bytes], url: str, began: float, log: Path) -> None:
    while not _is_ready(url):
        if process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
            raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-2000:]}")
        time.sleep(LOOK_SECONDS)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
