"""The whole plan of one model on one machine: memory, a decode step, a prefill step, retention."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

from server.roofline.bound import step_bound
from server.roofline.capacity import capacity
from server.roofline.costs import adapter_ranks, decode_step, prefill_step

if TYPE_CHECKING:
    from server.roofline.bound import StepBound
    from server.roofline.capacity import Capacity
    from server.roofline.hardware import Hardware
    from server.roofline.shapes import ModelShape

MAX_BATCH, MAX_RANK, MAX_PREFILL = 65536, 1024, 1 << 20
"""Beyond what any server and any adapter has: more is a slip of the keyboard."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the server is asked to do. Raises ValueError for what it cannot be."""

    batch: int  # sequences that decode at once
    context: int  # tokens of each, the one of this step included
    num_adapters: int  # distinct adapters among them
    ranks: tuple[int, ...]  # of the adapters, in turn
    prefill_tokens: int  # of a prefill step

    def __post_init__(self) -> None:
        for flag, value, least, most in (
            ("--batch", self.batch, 1, MAX_BATCH),
            ("--adapters", self.num_adapters, 0, self.batch),
            ("--prefill", self.prefill_tokens, 1, MAX_PREFILL),
            *(("--ranks", rank, 1, MAX_RANK) for rank in self.ranks),
        ):
            if not least <= value <= most:
                why = ", at most one for each sequence of --batch" if flag == "--adapters" else ""
                raise ValueError(f"{flag} is {value}: give {least} to {most}{why}")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `manylora plan` tells."""

    shape: ModelShape
    hardware: Hardware
    workload: Workload
    capacity: Capacity
    decode: StepBound
    prefill: StepBound
    by_distinct: tuple[tuple[int, StepBound], ...]  # decode steps with 1, √batch, batch adapters


def make_plan(shape: ModelShape, hardware: Hardware, workload: Workload) -> Plan:
    """The plan; ValueError where the context is not one of the model's, or rows exceed pages."""
    batch, context, ranks = workload.batch, workload.context, workload.ranks
    if not 1 <= context <= shape.max_context:
        raise ValueError(
            f"--context is {context}: give 1 to {shape.max_context}, which {shape.name} was made "
            "for"
        )

    def decode(num_adapters: int) -> StepBound:
        step = decode_step(batch, context, adapter_ranks(ranks, num_adapters))
        return step_bound(shape, step, hardware)

    prompts = prefill_step(
        workload.prefill_tokens, context, adapter_ranks(ranks, workload.num_adapters)
    )
    return Plan(
        shape=shape,
        hardware=hardware,
        workload=workload,
        capacity=capacity(shape, hardware, batch, context, ranks, workload.num_adapters),
        decode=decode(workload.num_adapters),
        prefill=step_bound(shape, prompts, hardware),
        by_distinct=tuple((n, decode(n)) for n in sorted({1, isqrt(batch), batch})),
    )
