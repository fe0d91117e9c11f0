"""The Triton kernels on a CUDA device against the reference on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels import reference

pytestmark = pytest.mark.gpu

TOLERANCES = [  # dtype, rtol, atol
    (torch.float32, 1e-4, 1e-4),
    (torch.bfloat16, 2**-7, 2**-7),
    (torch.float16, 2**-10, 2**-10),
]


def on_device(value, device):
    """A copy of a case or of one of its fields with every tensor on `device`."""
    if isinstance(value, torch.Tensor):
        # Through the storage, so that strides and the offset of a view survive.
        storage = torch.empty(0, dtype=value.dtype, device=device)
        storage.set_(value.untyped_storage().to(device=device))
        return storage.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(on_device(field, device) for field in value))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        moved = {name: on_device(getattr(value, name), device) for name in names}
        return dataclasses.replace(value, **moved)
    return value


@pytest.fixture
def cuda_ops():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import kernels.triton.ops

    return kernels.triton.ops


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "arguments",
    [
        {"popularity": "distinct", "num_tokens": 40},
        {"popularity": "skewed", "num_tokens": 200, "num_base": 9},
        {"popularity": "identical", "num_tokens": 400, "in_features": 2304},
        {"popularity": "uniform", "num_tokens": 90, "missing_targets": True, "strided": True},
        {"num_tokens": 30, "in_features": 20, "out_widths": (12, 4, 4)},
    ],
    ids=str,
)
def test_add_adapters_equals_the_reference(
    cuda_ops, make_adapter_case, arguments, dtype, rtol, atol
):
    case = make_adapter_case(dtype=dtype, **arguments)
    moved = on_device(case, "cuda")
    reference.add_adapters(case.out, case.x, case.storage, case.rows, case.index, case.span)
    cuda_ops.add_adapters(moved.out, moved.x, moved.storage, moved.rows, moved.index, moved.span)
    torch.testing.assert_close(moved.out.cpu(), case.out, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_adds_the_adapters_of_whatever_slots_it_is_replayed_with(
    cuda_ops, make_adapter_case, dtype
):
    case = make_adapter_case(num_tokens=16, num_base=0, dtype=dtype)
    moved = on_device(case, "cuda")
    index = moved.index._replace(
        segment_start=torch.arange(17, dtype=torch.int32, device="cuda"),
        segment_slot=moved.index.token_slot,
        num_base=0,
        max_segment=1,
        max_span_rows=384,
    )
    arguments = (moved.x, moved.storage, moved.rows, index, moved.span)
    cuda_ops.add_adapters(moved.out.clone(), *arguments)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_ops.add_adapters(moved.out, *arguments)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
    for token_slot in (case.index.token_slot, torch.arange(16) % 7 - 1, torch.full((16,), -1)):
        index.token_slot.copy_(token_slot)
        moved.out.copy_(case.out)
        graph.replay()
        expected = case.out.clone()
        step = case.index._replace(token_slot=token_slot, max_span_rows=384)
        reference.add_adapters(expected, case.x, case.storage, case.rows, step, case.span)
        torch.testing.assert_close(moved.out.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES, ids=str)
@pytest.mark.parametrize("traffic", ["decode", "prefill", "chunked", "mixed"])
@pytest.mark.parametrize("shape", [(9, 3, 64, 16), (8, 8, 64, 8), (32, 8, 128, 16)], ids=str)
@pytest.mark.parametrize("window", [0, 11])
def test_rope_and_attention_equal_the_reference(
    cuda_ops, make_attention_case, shape, traffic, window, dtype, rtol, atol
):
    num_heads, num_kv_heads, head_dim, block_size = shape
    case = make_attention_case(
        traffic=traffic,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    moved = on_device(case, "cuda")
    results = []
    for ops, one in ((reference, case), (cuda_ops, moved)):
        ops.rope_store_kv(one.qkv, one.cos_sin, one.positions, one.kv_cache, one.kv_slot)
        results.append(ops.paged_attention(one.qkv, one.kv_cache, one.index, one.scale, window))
    torch.testing.assert_close(moved.qkv.cpu(), case.qkv, rtol=rtol, atol=atol)
    torch.testing.assert_close(results[1].cpu(), results[0], rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES, ids=str)
def test_norm_and_activation_equal_the_reference(cuda_ops, dtype, rtol, atol):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 7, 576, generator=generator).to(dtype)
    weight = torch.randn(576, generator=generator).to(dtype)
    moved = [tensor.cuda() for tensor in (x, residual, weight)]
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    result = cuda_ops.add_rms_norm(*moved, 1e-5)
    torch.testing.assert_close(moved[1].cpu(), residual, rtol=rtol, atol=atol)
    torch.testing.assert_close(result.cpu(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        cuda_ops.silu_mul(moved[0]).cpu(), reference.silu_mul(x), rtol=rtol, atol=atol
    )
