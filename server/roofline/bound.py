"""The least time that a kernel and a step can take on given hardware.

A kernel takes at least as long as its bytes take to move and as its operations take to compute; a
step takes its kernels one after another. Launches, the host and imperfect kernels come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.roofline.costs import adapter_kernels, base_kernels

if TYPE_CHECKING:
    from server.roofline.costs import KernelCost, Step
    from server.roofline.hardware import Hardware
    from server.roofline.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class KernelBound:
    """One kernel's row in the roofline, over all its launches in the step."""

    cost: KernelCost
    num_bytes: int  # that have to pass between memory and chip
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        """The time bound."""
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def limit(self) -> str:
        """What the bound comes from: "memory", "compute", or "cache" where nothing is moved."""
        if self.compute_seconds > self.memory_seconds:
            return "compute"
        return "memory" if self.num_bytes else "cache"


@dataclass(frozen=True, slots=True)
class StepBound:
    """All kernels of one step."""

    step: Step
    base: tuple[KernelBound, ...]
    adapters: tuple[KernelBound, ...]

    @property
    def base_seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.base)

    @property
    def adapter_seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.adapters)

    @property
    def retention(self) -> float:
        """Speed with adapters ÷ speed of the base model alone; 1 without adapters."""
        return self.base_seconds / (self.base_seconds + self.adapter_seconds)


def kernel_bound(cost: KernelCost, hardware: Hardware) -> KernelBound:
    """The bound of one kernel.

    Activations count, what is rewritten twice, where those of one launch exceed the cache; smaller
    ones can stay in it from the kernel that writes them to the one that reads them.
    """
    is_cached = cost.activation_bytes <= cost.launches * hardware.cache_bytes
    moved = 0 if is_cached else cost.activation_bytes + cost.rewritten_bytes
    num_bytes = cost.streamed_bytes + moved
    return KernelBound(
        cost,
        num_bytes,
        num_bytes / hardware.bytes_per_second,
        cost.flops / hardware.flops_per_second,
    )


def step_bound(shape: ModelShape, step: Step, hardware: Hardware) -> StepBound:
    """The bound of every kernel of the step, in the order of a layer."""
    return StepBound(
        step,
        tuple(kernel_bound(cost, hardware) for cost in base_kernels(shape, step)),
        tuple(kernel_bound(cost, hardware) for cost in adapter_kernels(shape, step)),
    )
