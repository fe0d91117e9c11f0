"""A linear layer of the base model, with its weight in the layout that the device multiplies best.

Knows nothing of adapters: they are added to its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.cpu.packed_weight import PackedWeight
    from kernels.layout import RowReads

PACKED_FOR_NUM_ROWS = 32
"""Rows of x that oneDNN lays the weight out for; any number may be multiplied."""


class Linear:
    """y = x Wᵀ + b, rounded once to x's dtype, or to the one that is asked for.

    A bf16 weight on a CPU is kept only as panels for our own kernel where the processor multiplies
    bf16 without tiles of its own (AVX512-BF16 without AMX), in oneDNN's blocked layout on others
    that multiply bf16, and as it is elsewhere. For a given number of rows, a row of y depends on
    the same row of x alone, bit for bit; with panels, for any number.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, int8: bool = False) -> None:
        """weight [O, I], contiguous; bias [O], of the same dtype and device.

        `int8` keeps the weight in 8 bits. Raises ValueError on shapes that do not match, and where
        this machine cannot multiply int8.
        """
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shape = None if bias is None else list(bias.shape)
            raise ValueError(f"weight {list(weight.shape)} and bias {shape}: not [O, I] and [O]")
        self.out_features, self.in_features = weight.shape
        self._packed = _panels(weight, bias, int8)
        self.is_blocked = self._packed is None and _can_block(weight)
        if self._packed is None:
            self._weight = _block(weight) if self.is_blocked else weight
            self._bias = bias

    def forward(
        self, x: Tensor, dtype: torch.dtype | None = None, reads: RowReads | None = None
    ) -> Tensor:
        """x [T, I]; returns [T, O] in `dtype`, x's own without one, contiguous.

        `reads`: what is read from memory next; it may be asked for meanwhile.
        """
        dtype = dtype or x.dtype
        if self._packed is not None:
            return self._packed.multiply(x, dtype, reads)
        if not self.is_blocked:
            return torch.nn.functional.linear(x, self._weight, self._bias).to(dtype)
        multiply = torch.ops.mkldnn._linear_pointwise
        return cast(Tensor, multiply(x, self._weight, self._bias, "none", [], "")).to(dtype)


def can_serve_int8(device_type: str) -> bool:
    """Whether weights may be kept in 8 bits on this machine."""
    if device_type != "cpu":
        return False
    from kernels.cpu.runtime import has_features

    return has_features("avx512vnni", "avx512bf16")


def _panels(weight: Tensor, bias: Tensor | None, int8: bool) -> PackedWeight | None:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        if int8:
            raise ValueError(f"int8 weights are made of bfloat16 on a CPU, not of {weight.dtype}")
        return None
    from kernels.cpu.packed_weight import PackedWeight, can_pack

    if int8 or (can_pack(weight, int8=False) and not torch.cpu._is_amx_tile_supported()):
        return PackedWeight(weight, bias, int8=int8)
    return None


def _can_block(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _block(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_NUM_ROWS))
