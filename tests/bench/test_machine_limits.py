"""The roof, counted by hand for a model of two layers."""

from __future__ import annotations

import pytest

from bench.machine_limits import Limits, Work, roof_seconds
from bench.tiny_model import write_tiny_model
from server.model.config import read_model_config

# q, o 32x32; k, v 16x32; gate, up 48x32; down 32x48; each in two layers
LAYERS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
PER_RANK = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
HEAD = 257 * 32
NO_MEMORY = Limits(flops_per_second=1e6, bytes_per_second=1e30)
NO_ARITHMETIC = Limits(flops_per_second=1e30, bytes_per_second=1e6)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return read_model_config(write_tiny_model(tmp_path_factory.mktemp("model")), "tiny")


def test_arithmetic_counts_every_token_and_the_head_once_a_prompt(config):
    work = Work(num_requests=4, concurrency=2, num_prompt=10, num_output=5)
    flops = 2 * 4 * (10 * LAYERS + HEAD) + 2 * 4 * 4 * (LAYERS + HEAD)
    assert roof_seconds(NO_MEMORY, config, 2, work) == pytest.approx(flops / 1e6)


def test_memory_counts_the_base_once_a_step(config):
    work = Work(num_requests=4, concurrency=2, num_prompt=10, num_output=5)
    steps = 4 * 4 / 2
    assert roof_seconds(NO_ARITHMETIC, config, 2, work) == pytest.approx(
        steps * 2 * (LAYERS + HEAD) / 1e6
    )


@pytest.mark.parametrize(("num_adapters", "at_once"), [(1, 1), (2, 2), (8, 2)])
def test_memory_counts_each_distinct_adapter_of_a_step_once(config, num_adapters, at_once):
    base = Work(num_requests=8, concurrency=2, num_prompt=10, num_output=5)
    work = Work(8, 2, 10, 5, num_adapters=num_adapters, mean_rank=16.0)
    more = roof_seconds(NO_ARITHMETIC, config, 2, work) - roof_seconds(
        NO_ARITHMETIC, config, 2, base
    )
    assert more == pytest.approx(8 * 4 / 2 * 2 * at_once * 16 * PER_RANK / 1e6)
