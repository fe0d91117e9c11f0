"""The table of GPUs, and machines that are described by their rates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from server.roofline.hardware import GPUS, Hardware, find_hardware

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", GPUS)
def test_a_known_gpu_is_found_in_any_case(name):
    assert find_hardware(name) == find_hardware(name.upper()) == GPUS[name]


def test_the_paper_has_the_numbers_of_the_table():
    paper = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w[\w-]+)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", paper, re.MULTILINE
    )
    told = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert told == {
        name: [
            gpu.memory_bytes / 1e9,
            gpu.bytes_per_second / 1e9,
            gpu.flops_per_second / 1e12,
            gpu.cache_bytes / 2**20,
        ]
        for name, gpu in GPUS.items()
    }


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"memory_gb": 40}, {"memory_bytes": 40 * 10**9}),
        ({"bandwidth_gb": 3350}, {"bytes_per_second": 3.35e12}),
        ({"tflops": 500.5}, {"flops_per_second": 500.5e12}),
        ({"cache_mib": 0}, {"cache_bytes": 0}),
    ],
)
def test_what_is_given_replaces_that_value_and_no_other(given, changed):
    assert find_hardware("h200", **given) == replace(GPUS["h200"], **changed)


def test_any_machine_is_described_by_memory_bandwidth_and_rate():
    cpu = find_hardware("cpu", memory_gb=8, bandwidth_gb=40, tflops=0.35)
    assert cpu == Hardware("cpu", 8 * 10**9, 40e9, 0.35e12, 0)


@pytest.mark.parametrize("left_out", ["memory_gb", "bandwidth_gb", "tflops"])
def test_an_unknown_gpu_without_a_rate_is_refused_and_the_known_ones_are_named(left_out):
    given = {"memory_gb": 8.0, "bandwidth_gb": 40.0, "tflops": 1.0}
    del given[left_out]
    with pytest.raises(ValueError, match="gpu 'h900' is not known") as refused:
        find_hardware("h900", **given)
    assert all(name in str(refused.value) for name in (*GPUS, "--memory", "--bandwidth"))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["memory_gb", "bandwidth_gb", "tflops"])
def test_a_rate_that_is_no_positive_number_is_named(name, value):
    with pytest.raises(ValueError, match=rf"--{name.split('_')[0]} is {value}: give a positive"):
        find_hardware("l4", **{name: value})


def test_a_negative_cache_is_named():
    with pytest.raises(ValueError, match=r"--cache is -1: give 0 or a positive"):
        find_hardware("l4", cache_mib=-1)
