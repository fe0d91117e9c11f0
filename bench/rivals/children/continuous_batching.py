"""transformers' continuous batching: run in its environment; job on stdin, JSON out.

The first line holds the text of the first token of each request of the check, the others the
traces of each case: [sent, times of its tokens, number of tokens] in seconds of one clock.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

NO_TOKEN = -1  # as end of sequence: none


def main() -> None:
    """Load, check, warm up and time every case."""
    job = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    config = GenerationConfig(do_sample=False, eos_token_id=NO_TOKEN, max_new_tokens=1)
    settings = ContinuousBatchingConfig(
        num_blocks=64, max_batch_tokens=2048, max_requests_per_batch=64, allow_block_sharing=False
    )
    with model.continuous_batching_context_manager(config, True, None, settings) as manager:
        found = closed_loop(manager, job["check"]["prompts"], 1, 1)
        first = [tokens for tokens, _, _ in found]
        print(json.dumps({"answers": tokenizer.batch_decode(first)}), flush=True)
        for case in job["cases"]:
            prompts, concurrency = case["prompts"], case["concurrency"]
            closed_loop(manager, prompts, concurrency, job["num_warm_up"])
            found = closed_loop(manager, prompts, concurrency, job["num_output"])
            traces = [(sent, times, len(tokens)) for tokens, sent, times in found]
            print(json.dumps({"traces": traces}), flush=True)


def closed_loop(
    manager: Any, prompts: list[list[int]], concurrency: int, num_output: int
) -> list[tuple[list[int], float, list[float]]]:
    """Tokens, time of sending and times of the tokens of each request, in order."""
    sent: dict[str, float] = {}
    arrivals: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}

    def send() -> None:
        index = len(sent)
        name = f"{time.perf_counter_ns()}-{index}"
        sent[name], arrivals[name] = time.perf_counter(), []
        manager.add_request(prompts[index], name, num_output, streaming=True)

    for _ in range(min(concurrency, len(prompts))):
        send()
    while len(tokens) < len(prompts):
        output = manager.get_result(timeout=60)
        if output is None or output.error:
            raise RuntimeError(f"no answer: {output and output.error}")
        arrivals[output.request_id].append(time.perf_counter())
        if output.is_finished():
            tokens[output.request_id] = list(output.generated_tokens)
            if len(sent) < len(prompts):
                send()
    return [(tokens[name], sent[name], arrivals[name]) for name in sent]


if __name__ == "__main__":
    main()
