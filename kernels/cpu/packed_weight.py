"""A weight of the base model as the CPU multiplies it best: panels of bf16 or of int8."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.adapters import TILE
from kernels.cpu.dots import PANEL, STEP_BYTES
from kernels.cpu.linear import INT8_ZERO, multiply, multiply_int8, scratch_bytes_for
from kernels.cpu.runtime import has_features, workers
from kernels.layout import RowReads, row_elements

_KINDS: dict[torch.dtype, np.generic] = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
}
_CACHE_LINE = 64
_NO_READS = (0,) * 11


def can_pack(weight: Tensor, *, int8: bool) -> bool:
    """Whether this machine multiplies such a weight: bf16 [O, I], by AVX512-BF16 or -VNNI."""
    inputs_each = STEP_BYTES // (1 if int8 else 2)
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.shape[1] % inputs_each == 0
        and has_features("avx512vnni" if int8 else "avx512bf16")
    )


class PackedWeight:
    """x Wᵀ + b for one weight, of which this is the only copy.

    bf16: the exact products of bf16, summed in fp32. int8: weights are rounded to 255 levels of
    each output's own scale, the rows of x, as they come, to 255 levels of each row's own; products
    are summed exactly. Either way a row's result is the same to the bit whatever rows beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, int8: bool) -> None:
        """weight [O, I] bf16, bias [O]; ValueError unless `can_pack` says yes."""
        if not can_pack(weight, int8=int8):
            raise ValueError(
                f"a weight {weight.dtype} {list(weight.shape)} cannot be packed on this machine: "
                "keep it as it is"
            )
        self.num_outputs, self.num_inputs = weight.shape
        self._scale = None
        if int8:
            weight, scale = quantise(weight)
            self._scale = _padded(scale)
        self._panels = pack(weight)
        self._bias = _padded(torch.zeros(self.num_outputs) if bias is None else bias.float())

    def multiply(self, x: Tensor, dtype: torch.dtype, reads: RowReads | None = None) -> Tensor:
        """x [T, I] bf16, rows contiguous; returns [T, O] in `dtype`, bf16 or fp32, contiguous.

        `reads`: rank rows that are asked for meanwhile; the result does not depend on them.
        """
        if x.dtype != torch.bfloat16 or x.shape[1] != self.num_inputs or x.stride(1) != 1:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)} with strides {x.stride()}: contiguous rows of "
                f"{self.num_inputs} in bfloat16 are needed"
            )
        num_tokens, num_workers = x.shape[0], workers()
        out = torch.empty(num_tokens, self.num_outputs, dtype=dtype)
        is_int8 = self._scale is not None
        size = scratch_bytes_for(num_tokens, self.num_inputs, is_int8)
        scratch = torch.empty(num_workers, size, dtype=torch.uint8)
        where = (
            _KINDS[torch.bfloat16], _KINDS[dtype], out.data_ptr(), x.data_ptr(), x.stride(0),
            self._panels.data_ptr(),
        )  # fmt: skip
        shape = (
            self._bias.data_ptr(), num_tokens, self.num_inputs, self.num_outputs,
            scratch.data_ptr(), size, _addresses(reads), num_workers,
        )  # fmt: skip
        if self._scale is None:
            multiply(*where, *shape)
        else:
            multiply_int8(np.uint8(0), *where, self._scale.data_ptr(), *shape)
        return out


def _addresses(reads: RowReads | None) -> tuple[int, ...]:
    """The rows to ask for, as the kernel takes them."""
    if reads is None or not reads.adapters.max_span_rows:
        return _NO_READS
    storage, rows, adapters, span, num_inputs = reads
    num_targets = len(span.out_start) - 1
    row_size = row_elements(num_inputs, max(b - a for a, b in pairwise(span.out_start)))
    return (
        storage.data_ptr(), adapters.segment_slot.data_ptr(), len(adapters.segment_slot),
        rows.row_ptr.data_ptr(), rows.row_ptr.shape[1],
        rows.row_offset.data_ptr(), rows.row_offset.shape[1],
        span.first, span.first + num_targets, row_size * storage.element_size(),
        int(adapters.max_segment > TILE),
    )  # fmt: skip


def pack(weight: Tensor) -> Tensor:
    """[O, I] of 2 or 1 bytes an element to panels [ceil(O / 32), I / n, 32, n], n = 2 or 4.

    Missing outputs are zero; the panels begin at a cache line.
    """
    step = STEP_BYTES // weight.element_size()
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, num_panels * PANEL - num_outputs))
    panels = padded.view(num_panels, PANEL, num_inputs // step, step).transpose(1, 2)
    room = torch.empty(padded.numel() + _CACHE_LINE, dtype=weight.dtype)
    skip = -room.data_ptr() % _CACHE_LINE // weight.element_size()
    return room[skip : skip + padded.numel()].view(panels.shape).copy_(panels)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights plus INT8_ZERO, as uint8 [O, I], and the fp32 scale of each output [O].

    weight = (quantised - INT8_ZERO) * scale, to half a scale: symmetric, 255 levels an output.
    """
    largest = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float).tiny)
    scale = largest / 127
    return ((weight.float() / scale[:, None]).round() + INT8_ZERO).to(torch.uint8), scale


def _padded(values: Tensor) -> Tensor:
    """fp32, with zeros up to whole panels."""
    return torch.nn.functional.pad(values.float(), (0, -len(values) % PANEL)).contiguous()
