"""llama.cpp's server, in bf16, adapters by request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.rivals.environments import LLAMACPP
from bench.rivals.llamacpp_build import OPTIONS, PACKAGE, SERVER, VERSION, adapter_gguf
from bench.rivals.model_files import GGUF
from bench.rivals.rival import Launch, ServerRival
from bench.rivals.streaming import Request
from bench.rivals.workload import Case

SLOT_TOKENS = 256
"""Context of each slot: prompt and output of the workload fit."""


class LlamaCpp(ServerRival):
    """One launch for each number of requests in flight, with as many slots."""

    name = "llamacpp"
    title = "llama.cpp"
    settings = (
        "bf16 weights and adapters, built for this processor; as many slots as requests in "
        "flight; flash attention on; both cores; prompt cache off; base only without adapters "
        "loaded. It does not batch requests of different adapters."
    )
    ready_path = "/health"

    def problem(self) -> str | None:
        is_built = SERVER.is_file() and adapter_gguf(0).is_file()
        return None if is_built else "run `python -m bench.rivals.setup llamacpp`"

    def versions(self) -> dict[str, str]:
        options = " ".join(f"-D{name}={value}" for name, value in OPTIONS.items())
        return {PACKAGE: VERSION, "build": options} | LLAMACPP.versions("cmake", "ninja")

    def launches(self, cases: Sequence[Case]) -> list[Launch]:
        return [self._launch(case) for case in cases]

    def request(self, prompt: list[int], num_output: int, adapter: int | None) -> Request:
        body = {
            "prompt": prompt,
            "n_predict": num_output,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "stream": True,
            "cache_prompt": False,
            "return_tokens": True,
            # an empty list would mean all adapters, at scale 1
            "lora": [{"id": adapter or 0, "scale": float(adapter is not None)}],
        }
        return Request("/completion", body, _text, _count)

    def _launch(self, case: Case) -> Launch:
        command = [str(SERVER), "--host", "127.0.0.1", "--port", "{port}", "--model", str(GGUF)]
        command += ["--parallel", str(case.concurrency)]
        command += ["--ctx-size", str(case.concurrency * SLOT_TOKENS)]
        command += ["--threads", "2", "--threads-batch", "2", "--flash-attn", "on"]
        command += ["--cont-batching", "--cache-ram", "0", "--no-ui"]
        if case.num_adapters:
            paths = ",".join(str(adapter_gguf(i)) for i in range(case.num_adapters))
            command += ["--lora", paths, "--lora-init-without-apply"]
        return Launch("", (case,), case.num_adapters, tuple(command))


def _text(event: dict[str, Any]) -> str | None:
    return event["content"] if event.get("tokens") else None


def _count(event: dict[str, Any]) -> int | None:
    return event["tokens_predicted"] if event["stop"] else None
