"""A toy model on a toy machine: the whole engine, with a pool of a few pages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench.simulation.engine import Setup
from bench.simulation.fleet import Fleet
from bench.simulation.machine import Machine
from bench.workloads import Trace
from server.roofline.hardware import Hardware
from server.roofline.shapes import ITEM_BYTES, ModelShape

SHAPE = ModelShape("toy", 2, 64, 128, 4, 4, 16, 100, 2048)
PAGE_BYTES = SHAPE.page_geometry().page_elements * ITEM_BYTES


def machine_of(num_pages: int, **assumed: float) -> Machine:
    """Room for `num_pages` pages beside the weights; a gigabyte a second, on the link a tenth."""
    weights = SHAPE.num_parameters * ITEM_BYTES
    memory = weights + round((num_pages + 0.5) * PAGE_BYTES / 0.9)
    machine = Machine(Hardware("toy", memory, 1e9, 1e12, 0), 1e8)
    assumed = {"step_seconds": 1e-3, "load_seconds": 1e-2, **assumed}
    return dataclasses.replace(machine, assumed=dataclasses.replace(machine.assumed, **assumed))


@pytest.fixture(scope="session")
def shape() -> ModelShape:
    return SHAPE


@pytest.fixture(scope="session")
def make_machine():
    return machine_of


@pytest.fixture(scope="session")
def make_setup():
    """make_setup(num_pages, **settings) of a small server."""

    def make(num_pages: int = 120, **settings) -> Setup:
        small = {"max_num_seqs": 8, "max_batched_tokens": 64, "max_adapters": 4}
        return Setup(machine_of(num_pages), **{**small, **settings})

    return make


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    """Twelve adapters, ranks 4 and 8 in turn: 9 and 17 pages of 1024 elements."""
    return Fleet(SHAPE, [4, 8] * 6)


@pytest.fixture(scope="session")
def make_trace():
    """make_trace(num_requests, num_adapters, seed): lengths of a few pages, a few at a time."""

    def make(num_requests: int = 40, num_adapters: int = 12, seed: int = 0) -> Trace:
        generator = np.random.default_rng(seed)
        return Trace(
            np.cumsum(generator.exponential(0.02, num_requests)),
            generator.integers(-1, num_adapters, num_requests),
            generator.integers(1, 100, num_requests),
            generator.integers(1, 40, num_requests),
        )

    return make
