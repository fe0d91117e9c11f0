"""How long a step takes, from the bytes and operations of its kernels.

The kernels are those of `manylora plan`; here they run at the rates that are assumed of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.simulation.machine import Machine
from server.roofline.bound import kernel_bound
from server.roofline.costs import SPANS, Query, Step, adapter_kernels, base_kernels
from server.roofline.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class MixedStep(Step):
    """A step in which each sequence has an adapter of its own choice, not the next in turn."""

    query_ranks: tuple[int, ...]  # of each query's adapter; 0 = base model

    @property
    def rank_tokens(self) -> int:
        ranked = zip(self.queries, self.query_ranks, strict=True)
        return sum(query.num_tokens * rank for query, rank in ranked)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step, by what they are spent on."""

    base: float
    adapters: float
    fixed: float

    @property
    def seconds(self) -> float:
        return self.base + self.adapters + self.fixed


class CostModel:
    """Steps of one model on one machine, with adapters of the given targets."""

    def __init__(self, shape: ModelShape, machine: Machine, targets: Sequence[str]) -> None:
        """Raises ValueError where a span (q,k,v; o; gate,up; down) is targeted in part only."""
        self._shape = shape
        self._base = machine.of_kernels(machine.assumed.bandwidth)
        self._adapters = machine.of_kernels(machine.assumed.adapter_bandwidth)
        self._fixed = machine.assumed.step_seconds
        self._spans = _whole_spans(shape, targets)

    def cost(
        self, queries: Sequence[Query], query_ranks: Sequence[int], ranks: Sequence[int]
    ) -> StepCost:
        """query_ranks: of each query's adapter, 0 = base; ranks: of the distinct adapters."""
        step = MixedStep(tuple(queries), tuple(ranks), tuple(query_ranks))
        base = sum(kernel_bound(k, self._base).seconds for k in base_kernels(self._shape, step))
        adapters = sum(
            kernel_bound(kernel, self._adapters).seconds
            for kernel in adapter_kernels(self._shape, step)
            if kernel.name.split()[1] in self._spans
        )
        return StepCost(base, adapters, self._fixed)


def _whole_spans(shape: ModelShape, targets: Sequence[str]) -> frozenset[str]:
    names = [target.name for target in shape.targets]
    spans = {name: set(names[first:end]) for name, first, end in SPANS}
    chosen = {name for name, members in spans.items() if members <= set(targets)}
    if left := set(targets) - {target for name in chosen for target in spans[name]}:
        raise ValueError(
            f"{sorted(left)} are a part of a span only: the model costs whole spans, "
            f"{', '.join('+'.join(names[first:end]) for _, first, end in SPANS)}"
        )
    return frozenset(chosen)
