"""The Triton kernels compile for the GPUs served, and their machine code is what it should be.

Needs no GPU: `compile_kernels.py`, in a process of its own, compiles what the launchers launch
and takes the machine code apart with the tools that Triton ships.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
QUICK_JOBS = (
    "llama-3-8b/sm_90/qkv+step",
    "llama-3-8b/sm_80/qkv, segments of 3+qkv, segments of 100",
    "smollm2-135m/gfx942/qkv, segments of 3+qkv, segments of 100",
)
MODELS = (
    "llama-3-8b",
    "qwen2.5-7b",
    "qwen3-8b",
    "mistral-7b",
    "smollm2-135m",
    "smollm2-135m-fp16",
)
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
    if facts["spilled_bytes"] or facts["spill_instructions"]:
        found.append("spills registers to local memory")
    if facts["atomics"]:
        found.append("sums atomically, in no fixed order")
    if facts["shared_bytes"] > MAX_SHARED_BYTES[facts["target"]]:
        found.append("needs more shared memory than the target has")
    if facts["kernel"] in WIDE and not facts["loads_128"]:
        found.append("reads nothing 128 bits at a time")
    if facts["kernel"] in WIDE and facts["loads_16"]:
        found.append("reads 16 bits at a time")
    if facts["kernel"] in TENSOR_CORES and not facts["matrix_instructions"]:
        found.append("uses no tensor cores")
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


def test_every_kernel_compiles_for_a_gpu(quick_facts):
    assert {facts["kernel"] for facts in quick_facts} == set(KERNELS)
    assert {facts["target"] for facts in quick_facts} == set(TARGETS)


def test_machine_code_has_wide_loads_tensor_cores_and_no_spills(quick_facts):
    check(quick_facts)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_machine_code_of_every_shape_on_every_target(model, target):
    facts = compile_jobs(f"{model}/{target}/qkv+o+gate_up+down+step")
    assert {fact["kernel"] for fact in facts} == set(KERNELS)
    check(facts)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_fp32_models_compile_without_spills(target):
    facts = compile_jobs(f"smollm2-135m-fp32/{target}/qkv+step")
    spilled = [f for f in facts if f["spilled_bytes"] or f["spill_instructions"]]
    assert spilled == []


@pytest.mark.parametrize("model", ["llama-3-8b", "smollm2-135m"])
def test_steps_of_other_sizes_compile_nothing_anew(model):
    first, *others = compile_jobs(f"{model}/forms")
    assert len(first) >= len(KERNELS)
    assert [other == first for other in others] == [True, True]


def test_import_of_the_operations_touches_no_driver():
    program = (
        "import sys, kernels.triton.ops; from triton.runtime.driver import driver; "
        "sys.exit(driver._active is not None or driver._default is not None)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0
