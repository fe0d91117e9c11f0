"""One server of a rival: started, awaited until it is ready, stopped with all its processes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.rivals.environments import ROOT, RivalError

READY_SECONDS, STOP_SECONDS = 900, 30


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(
    command: tuple[str, ...], environment: dict[str, str], port: int, ready_path: str, log: Path
) -> Iterator[None]:
    """Run a server from when GET `ready_path` answers 200; its output goes to `log`.

    Raises RivalError if it ends before that, or is not ready in READY_SECONDS.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_ready(process, port, ready_path, log)
        yield
    finally:
        _stop(process)


def _await_ready(process: subprocess.Popen[bytes], port: int, path: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not _is_ready(port, path):
        if process.poll() is not None:
            raise RivalError(
                f"{process.args!r} ended with status {process.returncode} before it was ready: "
                f"see {log}"
            )
        if time.monotonic() > deadline:
            raise RivalError(f"{process.args!r} is not ready after {READY_SECONDS} s: see {log}")
        time.sleep(0.2)


def _is_ready(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then end whatever is left of its session."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
