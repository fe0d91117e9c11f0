"""From the blocks in which GGUF keeps a tensor's elements to fp32.

The kinds that the embedded model and most plain files use are read here with torch, in all
threads; the others by the gguf package, which is many times slower and takes time to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class BlockShape(NamedTuple):
    """How many elements one block has, and how many bytes."""

    num_elements: int
    num_bytes: int


def num_bytes(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this ggml type; ValueError if the type or its row size cannot be."""
    block = _OWN[kind][0] if kind in _OWN else _block_of_package(kind)
    columns = shape[-1] if shape else 1
    if columns % block.num_elements:
        raise ValueError(f"rows of {columns} elements are not whole blocks of ggml type {kind}")
    num_elements = 1
    for size in shape:
        num_elements *= size
    return num_elements // block.num_elements * block.num_bytes


def dequantise(data: Tensor, kind: int, shape: tuple[int, ...]) -> Tensor:
    """The elements [*shape] fp32 that `data` holds, the same to the bit as ggml's.

    data [num_bytes(kind, shape)] uint8. Raises NotImplementedError for a kind that nobody reads.
    """
    if kind not in _OWN:
        return _dequantise_by_package(data, kind, shape)
    block, read = _OWN[kind]
    return read(data.view(-1, block.num_bytes)).reshape(shape)


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of each block: [n, 1] fp32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor, start: int) -> Tensor:
    """The 4-bit numbers from byte `start` on, low ones before high ones: [n, 32] fp32."""
    packed = blocks[:, start : start + 16]
    out = torch.empty(len(blocks), 32)
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    return out


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 2).sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 4).mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _halves(blocks, 0)


_OWN: dict[int, tuple[BlockShape, Callable[[Tensor], Tensor]]] = {
    0: (BlockShape(1, 4), lambda data: data.view(torch.float32)),
    1: (BlockShape(1, 2), lambda data: data.view(torch.float16).float()),
    2: (BlockShape(32, 18), _q4_0),
    3: (BlockShape(32, 20), _q4_1),
    8: (BlockShape(32, 34), _q8_0),
    30: (BlockShape(1, 2), lambda data: data.view(torch.bfloat16).float()),
}
"""Block and reader [n, num_bytes] uint8 -> [n, num_elements] fp32 of F32, F16, Q4_0, … BF16."""


def _block_of_package(kind: int) -> BlockShape:
    import gguf

    return BlockShape(*gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)])


def _dequantise_by_package(data: Tensor, kind: int, shape: tuple[int, ...]) -> Tensor:
    import gguf

    rows = data.view(*shape[:-1], -1).numpy()
    return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType(kind)))
