"""A step's seconds are those of its bytes and operations at the assumed rates."""

from __future__ import annotations

import dataclasses

import pytest

from bench.simulation.cost_model import CostModel
from bench.simulation.fleet import ATTENTION, LLAMA_7B
from bench.simulation.machine import MACHINES, Assumptions
from server.roofline.bound import step_bound
from server.roofline.costs import Query, decode_step

A100 = MACHINES["a100-80"]
PERFECT = dataclasses.replace(A100, assumed=Assumptions(1.0, 1.0, 1.0, 1.0, 0.0, 0.0))
ALL = [target.name for target in LLAMA_7B.targets]
DECODES = [Query(1, 500, wants_logits=True)] * 8


def test_a_perfect_machine_takes_as_long_as_the_plan_says():
    ranks = (8, 16, 32, 64)
    bound = step_bound(LLAMA_7B, decode_step(8, 500, ranks), PERFECT.hardware)
    cost = CostModel(LLAMA_7B, PERFECT, ALL).cost(DECODES, [*ranks, *ranks], ranks)
    assert cost.base == pytest.approx(bound.base_seconds)
    assert cost.adapters == pytest.approx(bound.adapter_seconds)
    assert cost.fixed == 0


def test_a_decode_step_reads_weights_and_cache_at_the_assumed_share_of_bandwidth():
    """13.2 GB of weights without the embedding, 8 times 499 earlier tokens of 512 KiB."""
    cost = CostModel(LLAMA_7B, A100, ALL).cost(DECODES, [0] * 8, ())
    weights = (LLAMA_7B.num_parameters - 32000 * 4096) * 2
    cached = 8 * 499 * 2 * 32 * 4096 * 2
    assert cost.base == pytest.approx((weights + cached) / (0.8 * 2039e9), rel=0.01)
    assert cost.adapters == 0
    assert cost.fixed == A100.assumed.step_seconds


def test_a_prefill_step_computes_at_the_assumed_share_of_the_peak():
    prompt = [Query(2048, 2048, wants_logits=True)]
    cost = CostModel(LLAMA_7B, A100, ALL).cost(prompt, [0], ())
    layers = LLAMA_7B.num_parameters - 2 * 32000 * 4096
    least = 2 * 2048 * layers / (0.6 * 312e12)
    assert least < cost.base < 1.15 * least  # attention, head and norms on top


def test_a_distinct_adapter_is_read_once_however_many_share_it():
    model = CostModel(LLAMA_7B, A100, ATTENTION)
    shared = model.cost(DECODES, [64] * 8, (64,)).adapters
    distinct = model.cost(DECODES, [64] * 8, (64,) * 8).adapters
    row_bytes = 64 * 32 * 4 * (4096 + 4096) * 2
    assert shared == pytest.approx(row_bytes / (0.8 * 2039e9), rel=0.05)
    assert distinct == pytest.approx(8 * shared, rel=0.05)


def test_only_the_tokens_of_adapters_compute_with_them():
    model = CostModel(LLAMA_7B, A100, ALL)
    prompts = [Query(1000, 1000, wants_logits=False)] * 2
    assert (
        model.cost(prompts, [64, 0], (64,)).adapters < model.cost(prompts, [64, 64], (64,)).adapters
    )


def test_spans_without_adapters_cost_nothing():
    ranks = [16] * 8
    attention = CostModel(LLAMA_7B, A100, ATTENTION).cost(DECODES, ranks, (16,))
    everything = CostModel(LLAMA_7B, A100, ALL).cost(DECODES, ranks, (16,))
    assert attention.adapters < everything.adapters
    assert attention.base == everything.base


def test_slower_adapter_kernels_slow_adapters_alone():
    slow = dataclasses.replace(A100, assumed=Assumptions(adapter_bandwidth=0.4))
    fast, slower = (
        CostModel(LLAMA_7B, machine, ATTENTION).cost(DECODES, [64] * 8, (64,) * 8)
        for machine in (A100, slow)
    )
    assert slower.adapters == pytest.approx(2 * fast.adapters, rel=0.01)
    assert slower.base == fast.base
    assert slower.seconds == slower.base + slower.adapters + slower.fixed


def test_a_part_of_a_span_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\['q_proj'\].*q_proj\+k_proj\+v_proj"):
        CostModel(LLAMA_7B, A100, ["q_proj", "o_proj"])
