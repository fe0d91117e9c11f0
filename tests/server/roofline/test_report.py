"""Tables say what the JSON says, and both what they are."""

from __future__ import annotations

import json

import pytest

from server.roofline.hardware import GPUS
from server.roofline.plan import Workload, make_plan
from server.roofline.report import NATURE, to_json, to_text
from server.roofline.shapes import find_shape


def plan_on(gpu, model="Llama-3-8B", **changes):
    values = {
        "batch": 64,
        "context": 1024,
        "num_adapters": 64,
        "ranks": (16,),
        "prefill_tokens": 512,
    }
    return make_plan(find_shape(model), GPUS[gpu], Workload(**(values | changes)))


def test_both_forms_say_that_nothing_was_measured():
    plan = plan_on("h100")
    assert "measured nowhere" in NATURE
    assert NATURE in to_text(plan)
    assert json.loads(to_json(plan))["nature"] == NATURE


def test_the_tables_have_a_row_for_every_kernel_and_the_totals():
    text = to_text(plan_on("h100"))
    decode, prefill = text.split("Decode step")[1].split("Prefill step")
    for name in ("embedding", "qkv", "attention", "gate_up", "head", "shrink qkv", "expand down"):
        assert f"\n{name} " in decode
    assert "\nhead " not in prefill
    totals = {line.split()[0]: line.split()[-1] for line in decode.splitlines() if line}
    assert (totals["base"], totals["adapters"], totals["retention"]) == ("7.04", "1.60", "81.5%")


def test_columns_are_aligned_and_no_line_ends_in_blanks():
    lines = to_text(plan_on("h100")).split("Decode step")[1].split("\n\n")[1].splitlines()
    ends = {len(line) for line in lines if not line.startswith("retention")}
    assert len(ends) == 1
    assert all(line == line.rstrip() for line in to_text(plan_on("l4")).splitlines())


def test_the_json_is_one_line_and_holds_every_number():
    plan = plan_on("h100", ranks=(8, 64))
    text = to_json(plan)
    assert text.count("\n") == 0
    told = json.loads(text)
    assert told["decode"]["base_seconds"] == plan.decode.base_seconds
    assert told["prefill"]["retention"] == plan.prefill.retention
    assert [row["name"] for row in told["decode"]["base"]] == [
        k.cost.name for k in plan.decode.base
    ]
    row = told["decode"]["adapters"][0]
    assert row.keys() == {
        "name", "launches", "streamed_bytes", "activation_bytes", "rewritten_bytes", "flops",
        "num_bytes", "seconds", "limit",
    }  # fmt: skip
    assert [size["rank"] for size in told["memory"]["sizes"]] == [8, 64]
    assert told["memory"]["adapters_that_fit"] == plan.capacity.adapters_that_fit
    assert told["memory"]["fits"] is True
    assert [row["num_adapters"] for row in told["by_distinct_adapters"]] == [1, 8, 64]


def test_what_fits_is_said_with_the_arithmetic():
    text = to_text(plan_on("h100"))
    assert "Fits: 4096 pages of KV cache + 2560 of adapters = 6656, the pool has 27439." in text
    assert "Beside this KV cache 583 adapters fit; beside these adapters 398064 tokens" in text
    assert "one adapter of rank 16    80 MiB  40 pages = 640 tokens of KV cache" in text


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            plan_on("a10g", context=4096),
            "DOES NOT FIT: 16384 pages of KV cache + 2560 of adapters = 18944, the pool has 3407: "
            "lower --batch, --context or --adapters",
        ),
        (
            plan_on("l4", model="Llama-3.1-70B"),
            "DOES NOT FIT: weights of 141.11 GB leave no page in 24.00 GB of memory",
        ),
    ],
    ids=["batch", "weights"],
)
def test_what_does_not_fit_is_said_with_the_arithmetic_and_a_remedy(plan, said):
    assert said in to_text(plan)


def test_sizes_below_a_mebibyte_are_told_in_kibibytes():
    assert "pages of 180 KiB" in to_text(plan_on("l4", model="SmolLM2-135M"))
