"""Packed arrays come back as they were, aligned, from one buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.packing import ALIGNMENT, Field, Packing, staging_buffer, to_device

ARRAYS = {
    "ids": np.arange(3),
    "slots": np.array([-1, 2, 5, 7, 9], dtype=np.int32),
    "none": np.zeros(0, dtype=np.int32),
    "table": np.arange(6, dtype=np.int32).reshape(2, 3),
    "shares": np.array([[0.25], [0.5]]),
    "scales": np.array([1.5], dtype=np.float32),
}

fields = st.builds(
    Field,
    st.sampled_from(["int32", "int64", "float32", "float64"]),
    st.lists(st.integers(0, 5), min_size=1, max_size=2).map(tuple),
)


@given(st.lists(fields, max_size=8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_written_into_the_arrays_is_read_from_the_tensors(listed):
    packing = Packing({str(n): field for n, field in enumerate(listed)})
    buffer = staging_buffer(packing.num_bytes, torch.device("cpu"))
    generator = np.random.default_rng(len(listed))
    written = {}
    for name, array in packing.arrays(buffer.numpy()).items():
        written[name] = generator.integers(-1000, 1000, array.shape).astype(array.dtype)
        array[...] = written[name]
    tensors = packing.tensors(buffer)
    assert list(tensors) == list(written)
    for name, tensor in tensors.items():
        assert tensor.numpy().dtype == written[name].dtype
        assert tensor.shape == written[name].shape
        assert (tensor.numpy() == written[name]).all()
        assert (tensor.storage_offset() * tensor.itemsize) % ALIGNMENT == 0


def test_tensors_for_another_device_share_one_buffer():
    """The meta device stands for one that is not the CPU: it has shapes, and no memory."""
    tensors = to_device(ARRAYS, torch.device("meta"))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: array.shape for name, array in ARRAYS.items()
    }
    assert len({t.untyped_storage()._cdata for t in tensors.values()}) == 1
    assert all(t.device.type == "meta" for t in tensors.values())


def test_tensors_for_the_cpu_are_the_arrays():
    for name, tensor in to_device(ARRAYS, torch.device("cpu")).items():
        assert np.shares_memory(tensor.numpy(), ARRAYS[name]) or ARRAYS[name].size == 0
        assert tensor.numpy().dtype == ARRAYS[name].dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu_hold_what_the_arrays_hold():
    for _ in range(3):  # the pinned memory comes back
        for name, tensor in to_device(ARRAYS, torch.device("cuda")).items():
            assert (tensor.cpu().numpy() == ARRAYS[name]).all()
