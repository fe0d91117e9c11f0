"""What settings leave open is settled once, and what cannot be served is refused by name."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch

from server.config import Settings
from server.engine.spec import MAX_CPU_POOL_BYTES, MAX_HOST_BYTES, engine_spec
from server.memory.image_loader import LoadLimits
from server.model.config import ModelError


@pytest.fixture
def spec_of(tiny_llama):
    """spec_of(**settings) on the tiny model, on the CPU."""
    return lambda **settings: engine_spec(
        Settings(**{"model": str(tiny_llama), "device": "cpu", **settings})
    )


def test_limits_are_those_of_the_settings(spec_of):
    spec = spec_of(
        max_num_seqs=3,
        max_batched_tokens=33,
        max_adapters=5,
        max_adapter_rank=7,
        max_context=99,
        block_size=8,
        pool_bytes=10**6,
        prefix_cache=False,
        adapter_memory_share=0.25,
    )
    assert (spec.prefix_cache, spec.adapter_memory_share) == (False, 0.25)
    assert (spec.max_num_seqs, spec.max_batched_tokens, spec.max_adapters) == (3, 33, 5)
    assert (spec.max_adapter_rank, spec.max_context, spec.pool_bytes) == (7, 99, 10**6)
    assert spec.geometry.block_size == 8
    assert spec.max_rows == 7 * 7 * spec.config.num_layers


def test_a_page_of_keys_costs_its_products_and_a_page_of_an_adapter_its_copy(spec_of):
    spec = spec_of(block_size=8)
    weights = sum(t.in_features * t.out_features for t in spec.config.target_shapes())
    assert spec.compute_seconds == 2 * 2 * weights * 8 / 1e11
    assert spec.load_seconds == spec.page_bytes / 2e9
    assert spec_of(block_size=8, load_bytes_per_second=10**6).load_seconds == spec.page_bytes / 1e6


def test_what_the_settings_leave_open_comes_from_the_model(spec_of):
    spec = spec_of()
    assert spec.source.name == "tiny-llama"
    assert spec.max_context == spec.config.max_context == 128
    assert spec.geometry.block_size in (4, 8, 16)
    geometry = spec.geometry
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim) == (2, 2, 8)


def test_a_spec_goes_to_another_process_unchanged(spec_of):
    spec = spec_of()
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_page_bytes_and_layout_follow_the_dtype(spec_of, dtype):
    spec = spec_of(dtype=dtype, block_size=8)
    elements = 2 * 2 * 8 * 2 * 8  # layers, k and v, block, heads, head_dim
    assert spec.page_bytes == elements * (4 if dtype == "float32" else 2)
    assert (spec.layout.page_elements, spec.layout.dtype) == (elements, dtype)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({}, "float32")],
)
def test_auto_dtype_is_bfloat16_where_the_cpu_multiplies_it(
    spec_of, monkeypatch, capabilities, dtype
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert spec_of().dtype == dtype


@pytest.mark.parametrize(("has_cuda", "device"), [(False, "cpu"), (True, "cuda")])
def test_auto_device_is_the_gpu_where_there_is_one(spec_of, monkeypatch, has_cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    spec = spec_of(device="auto", dtype="auto" if has_cuda else "float32")
    assert spec.device == device
    if has_cuda:
        assert spec.dtype == "bfloat16"
        assert spec_of(device="cuda", dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"device": "cuda"}, ["device 'cuda'", "'cpu'"]),
        ({"dtype": "float16"}, ["float16", "'bfloat16'", "'float32'"]),
        ({"max_context": 129}, ["max_context 129", "128", "lower"]),
        ({"block_size": 1}, ["block_size 1", "raise block_size"]),
        ({"model": "/nonexistent/model.gguf"}, ["/nonexistent/model.gguf"]),
    ],
)
def test_refuses_what_cannot_be_served_and_says_what_can(spec_of, monkeypatch, wrong, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError) as refused:
        spec_of(**wrong)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "has_instructions", "words"),
    [
        ({"dtype": "float32"}, True, ["not in float32"]),
        ({"device": "cuda"}, True, ["'cuda'"]),
        ({"dtype": "bfloat16"}, False, ["AVX512-VNNI", "this 'cpu'"]),
    ],
)
def test_int8_is_refused_but_in_bfloat16_on_a_cpu_with_the_instructions(
    spec_of, monkeypatch, settings, has_instructions, words
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "server.engine.spec.can_serve_int8", lambda device: has_instructions and device == "cpu"
    )
    with pytest.raises(ModelError, match="quantization 'int8'") as refused:
        spec_of(quantization="int8", **settings)
    for word in [*words, "use 'none'"]:
        assert word in str(refused.value)


def test_int8_changes_the_weights_and_not_what_adapters_are_packed_for(spec_of, monkeypatch):
    monkeypatch.setattr("server.engine.spec.can_serve_int8", lambda device: device == "cpu")
    plain = spec_of(dtype="bfloat16")
    quantised = spec_of(dtype="bfloat16", quantization="int8")
    assert (plain.int8, quantised.int8) == (False, True)
    assert quantised.layout == plain.layout
    assert quantised.page_bytes == plain.page_bytes


def test_the_pool_has_the_pages_that_its_bytes_hold(spec_of):
    spec = spec_of(dtype="float32", pool_bytes=10 * 4096 + 1, block_size=8)
    assert spec.num_pages() == 10 * 4096 // spec.page_bytes


def test_a_pool_without_room_for_a_prompt_and_a_token_is_refused(spec_of):
    with pytest.raises(ModelError, match=r"100 bytes holds 0 pages of .*pool_bytes"):
        spec_of(pool_bytes=100).num_pages()


@pytest.mark.parametrize(("available", "pool"), [(4 << 20, 1 << 20), (1 << 60, MAX_CPU_POOL_BYTES)])
def test_the_pool_takes_a_quarter_of_free_memory_and_no_more_than_its_limit(
    spec_of, monkeypatch, available, pool
):
    monkeypatch.setattr(
        "server.engine.spec.psutil.virtual_memory", lambda: SimpleNamespace(available=available)
    )
    spec = spec_of()
    assert spec.num_pages() == pool // spec.page_bytes


def test_a_cpu_keeps_no_images_in_host_memory_unless_told_and_a_gpu_a_share(spec_of, monkeypatch):
    assert spec_of().loads == LoadLimits(num_threads=2, host_bytes=0)
    assert spec_of(host_memory_bytes=10**6).loads.host_bytes == 10**6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = SimpleNamespace(available=8 << 30)
    monkeypatch.setattr("server.engine.spec.psutil.virtual_memory", lambda: memory)
    loads = spec_of(device="cuda").loads
    assert (loads.num_threads, loads.host_bytes) == (4, 2 << 30)
    memory.available = 1 << 50
    assert spec_of(device="cuda").loads.host_bytes == MAX_HOST_BYTES
    assert spec_of(device="cuda", host_memory_bytes=0).loads.host_bytes == 0


def test_limits_on_loads_are_those_of_the_settings(spec_of):
    loads = spec_of(load_threads=7, load_bytes_per_second=10**6, load_timeout_seconds=2.5).loads
    assert (loads.num_threads, loads.bytes_per_second) == (7, 10**6)
    assert loads.timeout_seconds == 2.5


def test_host_memory_below_a_page_is_refused_with_the_numbers(spec_of):
    with pytest.raises(ModelError, match="host_memory_bytes 100 is less than a page"):
        spec_of(host_memory_bytes=100)
