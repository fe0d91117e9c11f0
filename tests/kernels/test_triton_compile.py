"""The Triton kernels compile for the GPUs served, and their machine code is what it should be.

Needs no GPU: `compile_kernels.py`, in a process of its own, compiles what the launchers launch
and takes the machine code apart with the tools that Triton ships.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# Loads of 128 bits are asked of every kernel that reads weights, whole activations or the KV
# cache. Attention's combination reads a few fp32 numbers, the rotation single heads.
WIDE = (
    "_bgmv_shrink_kernel",
    "_bgmv_expand_kernel",
    "_sgmv_shrink_kernel",
    "_sgmv_expand_kernel",
    "_decode_attention_kernel",
    "_prefill_attention_kernel",
    "_rms_norm_kernel",
    "_silu_mul_kernel",
)
TENSOR_CORES = (
    "_sgmv_shrink_kernel",
    "_sgmv_expand_kernel",
    "_decode_attention_kernel",
    "_prefill_attention_kernel",
)
KERNELS = (*WIDE, "_combine_splits_kernel", "_rope_store_kv_kernel")
# Warps of 64 that a multiprocessor holds at once; docs/kernels.md says why these are enough.
RESIDENT_WARPS = {
    "_bgmv_shrink_kernel": 32,
    "_bgmv_expand_kernel": 24,
    "_sgmv_shrink_kernel": 20,
    "_sgmv_expand_kernel": 16,
    "_decode_attention_kernel": 16,
    "_prefill_attention_kernel": 8,
    "_rms_norm_kernel": 48,
    "_silu_mul_kernel": 48,
    "_combine_splits_kernel": 32,
    "_rope_store_kv_kernel": 24,
}
QUICK_JOBS = (
    "llama-3-8b/sm_90/qkv+step",
    "llama-3-8b/sm_80/qkv, segments of 3+qkv, segments of 100",
    "smollm2-135m/gfx942/qkv, segments of 3+qkv, segments of 100",
)
SERVED = ("llama-3-8b", "qwen2.5-7b", "smollm2-135m")
MODELS = (*SERVED, "qwen3-8b", "mistral-7b", "smollm2-135m-fp16")
TARGETS = ("sm_80", "sm_90", "gfx942")
MAX_SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


def compile_jobs(*jobs):
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), *jobs],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def faults(facts):
    """What is wrong with one compiled launch; empty when nothing is."""
    found = []
    kernel, loads = facts["kernel"], facts["loads"]
    if facts["spilled_bytes"] or facts["spill_instructions"]:
        found.append("spills registers to local memory")
    if facts["atomics"]:
        found.append("sums atomically, in no fixed order")
    if facts["shared_bytes"] > MAX_SHARED_BYTES[facts["target"]]:
        found.append("needs more shared memory than the target has")
    if kernel in WIDE and loads.get("128", 0) < max(facts["tile_loads"], 1):
        found.append("does not read a whole tile 128 bits at a time")
    if kernel in WIDE and ("16" in loads or "8" in loads):
        found.append("reads 16 bits at a time")
    if kernel in TENSOR_CORES and not facts["matrix_instructions"]:
        found.append("uses no tensor cores")
    if facts.get("resident_warps", 64) < RESIDENT_WARPS[kernel]:
        found.append(f"fits a multiprocessor with {facts['resident_warps']} warps only")
    return found


def check(all_facts):
    wrong = [
        f"{facts['model']} {facts['target']} {facts['kernel']} ({facts['what']}): {fault}"
        for facts in all_facts
        for fault in faults(facts)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def quick_facts():
    return compile_jobs(*QUICK_JOBS)


@pytest.fixture(scope="module")
def served():
    """By model: the forms that one step needs, those that only others need, and the classes."""
    found = compile_jobs(*(f"{model}/forms" for model in SERVED))
    return {model: found[3 * i : 3 * i + 3] for i, model in enumerate(SERVED)}


@pytest.fixture(scope="module")
def machine_code():
    """docs/machine_code.py, which writes the table."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        spec = importlib.util.spec_from_file_location(
            "machine_code", ROOT / "docs" / "machine_code.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return module


@pytest.fixture(scope="module")
def table():
    """The section of docs/kernels.md that is written by docs/machine_code.py."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    return re.search(r"<!-- machine-code:[^\n]*-->\n(.*?)\n<!-- /machine-code -->", text, re.S)[1]


def test_every_kernel_compiles_for_a_gpu(quick_facts):
    assert {facts["kernel"] for facts in quick_facts} == set(KERNELS)
    assert {facts["target"] for facts in quick_facts} == set(TARGETS)


def test_machine_code_has_wide_loads_tensor_cores_and_no_spills(quick_facts):
    check(quick_facts)


@pytest.mark.parametrize("model", SERVED)
def test_steps_of_every_rank_and_size_need_the_same_code(served, model):
    first, only_others, _ = served[model]
    assert len(first) >= len(KERNELS)
    assert only_others == []


def test_the_table_has_a_row_for_every_class_that_is_checked(served, table):
    rows = [tuple(row.split(" | ")[:4]) for row in re.findall(r"^\| ([a-z].*) \|$", table, re.M)]
    expected = {
        (found["model"], found["kernel"].strip("_"), found["tile"], target)
        for _, _, classes in served.values()
        for found in classes
        for target in ("sm_80", "sm_90")
    }
    assert set(rows[1:]) == expected
    assert len(rows) == len(expected) + 1


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_of_every_shape(machine_code, table, target):
    """A form that models share is compiled once; the table tells what was found."""
    spans = "qkv+o+gate_up+down+step"
    facts = compile_jobs(*(f"{model}/{target}/{spans}" for model in MODELS))
    for model in MODELS:
        assert {fact["kernel"] for fact in facts if fact["model"] == model} == set(KERNELS)
    check(facts)
    if target in machine_code.TARGETS and f"Triton {version('triton')}." in table:
        told = [row for row in table.split("\n") if f" | {target} | " in row]
        told_of = [fact for fact in facts if fact["model"] in SERVED]
        assert told == machine_code.section(told_of).split("\n")[4:], "run `make machine-code`"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_fp32_models_compile_without_spills(target):
    facts = compile_jobs(f"smollm2-135m-fp32/{target}/qkv+step")
    spilled = [f for f in facts if f["spilled_bytes"] or f["spill_instructions"]]
    assert spilled == []


def test_import_of_the_operations_touches_no_driver():
    program = (
        "import sys, kernels.triton.ops; from triton.runtime.driver import driver; "
        "sys.exit(driver._active is not None or driver._default is not None)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0
