"""manylora's own server, over HTTP like the others."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version

from bench.rivals.environments import RIVALS
from bench.rivals.model_files import MODEL, NUM_ADAPTERS, adapter_directory, adapter_name
from bench.rivals.rival import Launch, ServerRival, openai_count, openai_text
from bench.rivals.streaming import Request
from bench.rivals.workload import Case


class Manylora(ServerRival):
    """One launch for all cases, with all adapters registered, in a given set of extra flags."""

    ready_path = "/ready"

    def __init__(self, name: str, title: str, flags: tuple[str, ...], settings: str) -> None:
        self.name, self.title, self.settings = name, title, settings
        self._flags = flags

    def problem(self) -> str | None:
        return None if MODEL.is_dir() else "run `python -m bench.rivals.setup models`"

    def versions(self) -> dict[str, str]:
        packages = ("manylora", "torch", "numba")
        return {"python": platform.python_version()} | {name: version(name) for name in packages}

    def launches(self, cases: Sequence[Case]) -> list[Launch]:
        command = [sys.executable, "-m", "server.cli", "serve", "--model", str(MODEL)]
        command += ["--host", "127.0.0.1", "--port", "{port}", *self._flags]
        command += ["--data-dir", str(RIVALS / "manylora" / "data")]
        for index in range(NUM_ADAPTERS):
            command += ["--adapter", f"{adapter_name(index)}={adapter_directory(index)}"]
        return [Launch("", tuple(cases), NUM_ADAPTERS, tuple(command))]

    def request(self, prompt: list[int], num_output: int, adapter: int | None) -> Request:
        body = {
            "model": MODEL.name if adapter is None else adapter_name(adapter),
            "prompt": prompt,
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Request("/v1/completions", body, openai_text, openai_count)


MANYLORA = (
    Manylora(
        "manylora", "manylora", ("--no-prefix-cache",),
        "--no-prefix-cache, adapters registered throughout",
    ),
    Manylora(
        "manylora-int8", "manylora, int8 base", ("--no-prefix-cache", "--quantization", "int8"),
        "--no-prefix-cache --quantization int8, adapters registered throughout",
    ),
)  # fmt: skip
