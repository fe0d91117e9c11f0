"""The bound is the larger of two times, a step the sum of its kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.roofline.bound import kernel_bound, step_bound
from server.roofline.costs import KernelCost, decode_step, prefill_step
from server.roofline.hardware import GPUS
from server.roofline.shapes import SHAPES

gpus = st.sampled_from(sorted(GPUS))
models = st.sampled_from(sorted(SHAPES))
batches = st.integers(1, 256)
contexts = st.integers(1, 4096)
ranks = st.integers(1, 128)


def decode(model, gpu, batch, context, rank, num_adapters):
    step = decode_step(batch, context, (rank,) * num_adapters)
    return step_bound(SHAPES[model], step, GPUS[gpu])


@pytest.mark.parametrize(
    ("cost", "num_bytes", "seconds", "limit"),
    [
        (KernelCost("k", 2, 3000, 0, 0, 10**6), 3000, 3e-6, "memory"),
        (KernelCost("k", 2, 3000, 0, 0, 10**7), 3000, 1e-5, "compute"),
        (KernelCost("k", 2, 3000, 400, 100, 0), 3500, 3.5e-6, "memory"),
    ],
)
def test_a_kernel_takes_as_long_as_its_bytes_or_its_operations(
    machine, cost, num_bytes, seconds, limit
):
    bound = kernel_bound(cost, machine)
    assert (bound.num_bytes, bound.limit) == (num_bytes, limit)
    assert bound.seconds == pytest.approx(seconds)


def test_activations_count_where_those_of_one_launch_exceed_the_cache(machine):
    cost = KernelCost("k", 2, 3000, 400, 100, 0)
    assert kernel_bound(cost, replace(machine, cache_bytes=200)).num_bytes == 3000
    assert kernel_bound(cost, replace(machine, cache_bytes=199)).num_bytes == 3500


def test_a_kernel_that_moves_nothing_takes_no_time(machine):
    bound = kernel_bound(KernelCost("k", 1, 0, 100, 0, 0), replace(machine, cache_bytes=100))
    assert (bound.seconds, bound.limit) == (0, "cache")


def test_a_step_is_the_sum_of_its_kernels_and_retention_their_ratio(tiny, machine):
    bound = step_bound(tiny, decode_step(3, 10, (4, 6)), machine)
    # Without a cache every byte that test_costs.py counts is moved, and nothing is compute-bound.
    base = sum(
        kernel.cost.streamed_bytes + kernel.cost.activation_bytes + kernel.cost.rewritten_bytes
        for kernel in bound.base
    )
    assert bound.base_seconds == pytest.approx(base / 1e9)
    assert bound.adapter_seconds == pytest.approx(sum(k.num_bytes for k in bound.adapters) / 1e9)
    both = bound.base_seconds + bound.adapter_seconds
    assert bound.retention == pytest.approx(bound.base_seconds / both)


@given(models, gpus, batches, contexts)
def test_without_adapters_retention_is_whole(model, gpu, batch, context):
    bound = decode(model, gpu, batch, context, 16, 0)
    assert bound.adapters == ()
    assert bound.retention == 1


@given(models, gpus, batches, contexts, ranks, st.data())
def test_retention_is_a_share_and_no_higher_with_more_distinct_adapters_or_ranks(
    model, gpu, batch, context, rank, data
):
    num_adapters = data.draw(st.integers(1, batch))
    bound = decode(model, gpu, batch, context, rank, num_adapters)
    assert 0 < bound.retention < 1
    higher = decode(model, gpu, batch, context, rank + 1, num_adapters)
    assert higher.adapter_seconds > bound.adapter_seconds
    assert higher.base == bound.base
    if num_adapters < batch:
        more = decode(model, gpu, batch, context, rank, num_adapters + 1)
        assert more.adapter_seconds >= bound.adapter_seconds
        assert sum(k.num_bytes for k in more.adapters) > sum(k.num_bytes for k in bound.adapters)
        assert more.base == bound.base


@given(models, gpus, batches, contexts, st.integers(1, 4096))
def test_a_longer_context_takes_longer_and_costs_the_adapters_nothing(
    model, gpu, batch, context, more
):
    short = decode(model, gpu, batch, context, 16, 1)
    long = decode(model, gpu, batch, context + more, 16, 1)
    assert long.base_seconds > short.base_seconds
    assert long.adapters == short.adapters


@given(models, gpus, st.integers(1, 4096), st.integers(1, 4096), contexts)
def test_more_prefill_tokens_never_take_less(model, gpu, tokens, more, context):
    def seconds(num_tokens):
        step = prefill_step(num_tokens, context, (16,))
        bound = step_bound(SHAPES[model], step, GPUS[gpu])
        return bound.base_seconds + bound.adapter_seconds

    assert seconds(tokens) <= seconds(tokens + more) * (1 + 1e-12)


@given(models, gpus, batches, contexts, st.floats(1.01, 10))
def test_faster_memory_and_arithmetic_never_take_longer(model, gpu, batch, context, factor):
    step = decode_step(batch, context, (16,) * batch)
    slow = GPUS[gpu]
    base = step_bound(SHAPES[model], step, slow).base_seconds
    for name in ("bytes_per_second", "flops_per_second"):
        fast = replace(slow, **{name: getattr(slow, name) * factor})
        assert step_bound(SHAPES[model], step, fast).base_seconds <= base
    both = replace(
        slow,
        bytes_per_second=slow.bytes_per_second * factor,
        flops_per_second=slow.flops_per_second * factor,
    )
    assert step_bound(SHAPES[model], step, both).base_seconds == pytest.approx(base / factor)
