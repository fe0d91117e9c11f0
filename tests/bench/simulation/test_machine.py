"""What is assumed of a machine is said with every number, and is what is computed with."""

from __future__ import annotations

import pytest

from bench.simulation.machine import MACHINES, SIMULATED


def test_every_number_that_is_assumed_is_told():
    told = MACHINES["a100-80"].described()
    for part in ("80 GB", "2039 GB/s", "312 TFLOPS", "31.5 GB/s", "60%", "80%", "75%", "2 ms"):
        assert part in told
    assert "measured nowhere" in SIMULATED


@pytest.mark.parametrize("name", MACHINES)
def test_kernels_and_loads_get_a_share_of_the_peaks(name):
    machine = MACHINES[name]
    kernels = machine.of_kernels(0.5)
    assert kernels.bytes_per_second == 0.5 * machine.hardware.bytes_per_second
    assert kernels.flops_per_second == 0.6 * machine.hardware.flops_per_second
    assert kernels.cache_bytes == machine.hardware.cache_bytes
    assert machine.load_bytes_per_second == 0.75 * machine.link_bytes_per_second
