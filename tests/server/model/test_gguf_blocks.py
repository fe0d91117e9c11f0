"""Blocks are dequantised to the bit as the gguf package does it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from server.model.gguf_blocks import dequantise, num_bytes

Kind = gguf.GGMLQuantizationType
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q5_1, Kind.Q6_K]


def random_bytes(kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Any blocks, but finite scales: every fp16 or fp32 in them has a small exponent."""
    random = np.random.default_rng(int(kind))
    data = random.integers(0, 256, num_bytes(kind, shape), dtype=np.uint8)
    block = gguf.GGML_QUANT_SIZES[kind][1]
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        data[block - 1 :: block] &= 0xBF
    for start in {Kind.Q4_1: (1, 3), Kind.Q5_1: (1, 3), Kind.Q6_K: (209,)}.get(kind, (1,)):
        if block > 4:
            data[start::block] &= 0xBF
    return data


@pytest.mark.parametrize("shape", [(256,), (3, 512), (2, 3, 256)])
@pytest.mark.parametrize("kind", KINDS)
def test_elements_are_the_packages_to_the_bit(kind, shape):
    data = random_bytes(kind, shape)
    rows = data.reshape(*shape[:-1], -1)
    expected = torch.from_numpy(gguf.dequantize(rows, kind).copy())
    found = dequantise(torch.from_numpy(data), kind, shape)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_the_packages(kind):
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    assert num_bytes(kind, (6, 2 * elements)) == 12 * size
    assert num_bytes(kind, (0, elements)) == 0


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q6_K])
def test_rows_that_are_no_whole_blocks_are_refused(kind):
    with pytest.raises(ValueError, match=f"rows of 33 elements .* type {int(kind)}"):
        num_bytes(kind, (2, 33))


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="4242"):
        num_bytes(4242, (1,))
    with pytest.raises(NotImplementedError):
        dequantise(torch.zeros(4, dtype=torch.uint8), Kind.I32, (1,))
