"""The whole plan, held against arithmetic that was made elsewhere."""

from __future__ import annotations

import pytest

from server.roofline.hardware import GPUS, find_hardware
from server.roofline.plan import MAX_BATCH, MAX_PREFILL, MAX_RANK, Workload, make_plan
from server.roofline.shapes import find_shape

LLAMA = find_shape("Llama-3-8B")


def workload(**changes):
    values = {
        "batch": 64,
        "context": 1024,
        "num_adapters": 64,
        "ranks": (16,),
        "prefill_tokens": 512,
    }
    return Workload(**(values | changes))


def test_64_sequences_of_1024_tokens_with_64_adapters_on_3350_gb_a_second():
    """Llama-3-8B in bf16: base step 7.04 ms, adapters 1.60 ms, an adapter 80 MiB, 640 KV tokens."""
    plan = make_plan(LLAMA, GPUS["h100"], workload())
    assert round(plan.decode.base_seconds * 1e3, 2) == 7.04
    assert round(plan.decode.adapter_seconds * 1e3, 2) == 1.60
    (size,) = plan.capacity.sizes
    assert size.row_bytes == 80 << 20
    assert size.num_pages * plan.capacity.block_size == 640
    assert size.row_bytes == 640 * LLAMA.kv_bytes_per_token
    assert round(plan.decode.retention, 3) == 0.815


def test_an_h200_at_that_bandwidth_has_the_same_step():
    slowed = find_hardware("h200", bandwidth_gb=3350)
    check = make_plan(LLAMA, GPUS["h100"], workload())
    assert make_plan(LLAMA, slowed, workload()).decode == check.decode
    faster = make_plan(LLAMA, GPUS["h200"], workload()).decode
    assert round(faster.base_seconds * 1e3, 2) == 4.92
    assert round(faster.adapter_seconds * 1e3, 2) == 1.12


def test_retention_is_told_for_one_adapter_the_square_root_and_one_for_each_sequence():
    plan = make_plan(LLAMA, GPUS["h100"], workload(num_adapters=8))
    assert [n for n, _ in plan.by_distinct] == [1, 8, 64]
    assert plan.by_distinct[1][1] == plan.decode
    falling = [bound.retention for _, bound in plan.by_distinct]
    assert falling == sorted(falling, reverse=True)
    assert [
        n for n, _ in make_plan(LLAMA, GPUS["l4"], workload(batch=2, num_adapters=1)).by_distinct
    ] == [1, 2]


def test_a_prefill_step_has_the_adapters_of_its_prompts():
    plan = make_plan(LLAMA, GPUS["h100"], workload(prefill_tokens=3000, num_adapters=2))
    assert len(plan.prefill.step.queries) == 3
    assert plan.prefill.step.used_ranks == (16, 16)
    assert plan.prefill.step.num_tokens == 3000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, f"--batch is 0: give 1 to {MAX_BATCH}"),
        ({"batch": MAX_BATCH + 1}, f"--batch is {MAX_BATCH + 1}: give 1 to {MAX_BATCH}"),
        ({"num_adapters": -1}, "--adapters is -1: give 0 to 64"),
        ({"num_adapters": 65}, "--adapters is 65: give 0 to 64, at most one for each sequence"),
        ({"ranks": (8, 0)}, f"--ranks is 0: give 1 to {MAX_RANK}"),
        ({"ranks": (MAX_RANK + 1,)}, f"--ranks is {MAX_RANK + 1}: give 1 to {MAX_RANK}"),
        ({"prefill_tokens": 0}, f"--prefill is 0: give 1 to {MAX_PREFILL}"),
        ({"prefill_tokens": MAX_PREFILL + 1}, f"--prefill is {MAX_PREFILL + 1}: give 1 to"),
    ],
)
def test_what_no_server_does_is_refused_with_value_and_limit(change, said):
    with pytest.raises(ValueError, match=": give ") as refused:
        workload(**change)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("context", [0, 8193])
def test_a_context_that_the_model_does_not_have_is_refused(context):
    with pytest.raises(ValueError, match=rf"--context is {context}: give 1 to 8192, which Llama"):
        make_plan(LLAMA, GPUS["h100"], workload(context=context))
