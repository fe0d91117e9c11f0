"""PEFT's mixed batch: run in PEFT's environment; job on stdin, JSON lines on stdout.

The first line holds the text of the first token of each request of the check, the others the
traces of each case: [sent, times of its tokens, number of tokens] in seconds of one clock.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

BASE = "__base__"  # PEFT's name for "no adapter"


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the tokens of a step were handed out; the first hand-out is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    """Load, check, warm up and time every case."""
    job = json.load(sys.stdin)
    model = load(job)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    first, _ = generate(model, job["check"]["prompts"], job["check"]["adapters"], 1)
    print(json.dumps({"answers": tokenizer.batch_decode(first)}), flush=True)
    for case in job["cases"]:
        waves(model, case, job["num_warm_up"])
        print(json.dumps({"traces": waves(model, case, job["num_output"])}), flush=True)


def load(job: dict[str, Any]) -> Any:
    """The model with all adapters, in bf16, in evaluation mode."""
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    first, *others = job["adapters"]
    model = PeftModel.from_pretrained(
        base, first, "adapter-0", autocast_adapter_dtype=False, low_cpu_mem_usage=True
    )
    for index, directory in enumerate(others, start=1):
        model.load_adapter(
            directory, f"adapter-{index}", autocast_adapter_dtype=False, low_cpu_mem_usage=True
        )
    return model.eval()


def waves(model: Any, case: dict[str, Any], num_output: int) -> list[tuple[float, Any, int]]:
    """Traces of a case's requests, as many at a time as are to be in flight."""
    traces = []
    for begin in range(0, len(case["prompts"]), case["concurrency"]):
        wave = slice(begin, begin + case["concurrency"])
        sent = time.perf_counter()
        tokens, times = generate(model, case["prompts"][wave], case["adapters"][wave], num_output)
        traces += [(sent, times, len(row)) for row in tokens]
    return traces


@torch.inference_mode()
def generate(
    model: Any, prompts: list[list[int]], adapters: list[int | None], num_output: int
) -> tuple[list[list[int]], list[float]]:
    """The new tokens of each prompt of one length, and the time of each step."""
    ids = torch.tensor(prompts)
    clock = Clock()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[BASE if index is None else f"adapter-{index}" for index in adapters],
        do_sample=False,
        max_new_tokens=num_output,
        min_new_tokens=num_output,
        streamer=clock,
    )
    return output[:, ids.shape[1] :].tolist(), clock.times[1:]


if __name__ == "__main__":
    main()
