"""The simulated machines, and what is assumed of them: rates of GPUs, links and kernels.

Peak rates are those of `manylora plan`; what of them a step reaches is assumed here and nowhere
else, and every table of the simulation prints it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from server.roofline.hardware import GIGA, GPUS, Hardware

SIMULATED = "SIMULATED: times come from a cost model and a virtual clock, measured nowhere"
"""Stands on every table, plot and record."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of peak rates, and times that depend on no size."""

    flops: float = 0.6  # of the peak, of every product
    bandwidth: float = 0.8  # of the peak, of kernels of the base model
    adapter_bandwidth: float = 0.8  # of the peak, of shrink and expand: rows lie scattered
    link: float = 0.75  # of the PCIe link's nominal rate, from pinned memory
    step_seconds: float = 2e-3  # a step's share that overlaps nothing: launches, host, sampling
    load_seconds: float = 1e-3  # a load's share that is no copying: lookup, table, one more step


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU behind a PCIe link, with host memory that holds every adapter's image, pinned."""

    hardware: Hardware
    link_bytes_per_second: float  # nominal, from host to device
    assumed: Assumptions = Assumptions()

    def of_kernels(self, bandwidth: float) -> Hardware:
        """The hardware at the rates that kernels reach; `bandwidth` is their share of its peak."""
        return dataclasses.replace(
            self.hardware,
            bytes_per_second=self.hardware.bytes_per_second * bandwidth,
            flops_per_second=self.hardware.flops_per_second * self.assumed.flops,
        )

    @property
    def load_bytes_per_second(self) -> float:
        """What loads share."""
        return self.link_bytes_per_second * self.assumed.link

    def described(self) -> str:
        """The assumptions as one paragraph, for people."""
        gpu, assumed = self.hardware, self.assumed
        return (
            f"{gpu.name}: {gpu.memory_bytes / GIGA:g} GB, {gpu.bytes_per_second / GIGA:g} GB/s, "
            f"{gpu.flops_per_second / 1e12:g} TFLOPS, PCIe {self.link_bytes_per_second / GIGA:g} "
            f"GB/s. Assumed: {assumed.flops:.0%} of the peak of products, {assumed.bandwidth:.0%} "
            f"of the bandwidth in the base model, {assumed.adapter_bandwidth:.0%} in adapter "
            f"kernels, each of which reads a distinct adapter once a step; "
            f"{assumed.step_seconds * 1e3:g} ms of every step overlap nothing. Loads come from "
            f"pinned host memory, one after another, {assumed.link:.0%} of the link and "
            f"{assumed.load_seconds * 1e3:g} ms each, and overlap steps at no cost to them"
        )


MACHINES = {
    "a10g": Machine(GPUS["a10g"], 31.5 * GIGA),
    "a100-80": Machine(GPUS["a100-80"], 31.5 * GIGA),
    "h100": Machine(GPUS["h100"], 63 * GIGA),
}
"""PCIe 4.0 x16, 4.0 x16, 5.0 x16."""
