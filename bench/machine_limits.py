"""What the machine allows: its GEMM rate and its memory's read rate, and the roof they set.

The roof counts multiplications and the reading of weights, each at the measured rate, and nothing
else: no attention, no norms, no sampling, no scheduling. Nothing can be faster; much can be slower.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from server.model.config import ModelConfig
from server.model.linear import Linear

GEMM_SHAPE = (512, 2048, 2048)  # rows, inputs, outputs
READ_BYTES = 256 << 20  # beyond any cache
REPEATS = 9


@dataclass(frozen=True, slots=True)
class Limits:
    """Best of several short measurements; flops count a multiplication and an addition as two."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, num_flops: float, num_bytes: float) -> float:
        """The least time for this much arithmetic over this much memory."""
        return max(num_flops / self.flops_per_second, num_bytes / self.bytes_per_second)

    def as_dict(self) -> dict[str, float]:
        """For a record."""
        return asdict(self)


def measure_limits(device: str, dtype: torch.dtype) -> Limits:
    """Multiply, by our linear layer and by torch's, and read on `device` ("cpu" or "cuda")."""
    num_rows, num_inputs, num_outputs = GEMM_SHAPE
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    weight = torch.randn(num_outputs, num_inputs, device=device).to(dtype)
    linear = Linear(weight)
    memory = torch.ones(READ_BYTES // 4, device=device)
    multiply, read = [], []
    for _ in range(REPEATS):
        begin = _now(device)
        linear.forward(x)
        first = _now(device)
        torch.nn.functional.linear(x, weight)
        second = _now(device)
        memory.sum()
        read.append(_now(device) - second)
        multiply += [first - begin, second - first]
    del x, weight, linear, memory
    if device == "cuda":
        torch.cuda.empty_cache()  # the engine's pool takes what is free
    num_flops = 2 * num_rows * num_inputs * num_outputs
    return Limits(num_flops / min(multiply), READ_BYTES / min(read))


@dataclass(frozen=True, slots=True)
class Work:
    """num_requests, `concurrency` at a time; num_adapters = 0 for the base model alone."""

    num_requests: int
    concurrency: int
    num_prompt: int  # tokens of each
    num_output: int
    num_adapters: int = 0  # requests take turns through them
    mean_rank: float = 0.0  # in all projections


def roof_seconds(limits: Limits, config: ModelConfig, itemsize: int, work: Work) -> float:
    """Least seconds for the work with weights of `itemsize` bytes an element.

    Prompts are counted as if they filled whole steps; a decode step reads the base's weights once
    and each distinct adapter of its sequences once, and multiplies them for every sequence.
    """
    targets = config.target_shapes()
    layers = config.num_layers * sum(t.in_features * t.out_features for t in targets)
    head = config.vocab_size * config.hidden_size  # for the last token of a prompt only
    adapter = (
        config.num_layers * sum(t.in_features + t.out_features for t in targets) * work.mean_rank
    )
    num_distinct = min(work.num_adapters, work.concurrency)
    has_adapters = work.num_adapters > 0
    num_steps = work.num_requests * (work.num_output - 1) / work.concurrency
    prompt = work.num_requests * (work.num_prompt * (layers + has_adapters * adapter) + head)
    base_step = limits.seconds(2 * work.concurrency * (layers + head), itemsize * (layers + head))
    adapter_step = limits.seconds(
        2 * work.concurrency * has_adapters * adapter, itemsize * num_distinct * adapter
    )
    return 2 * prompt / limits.flops_per_second + num_steps * (base_step + adapter_step)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
