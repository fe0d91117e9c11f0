"""A linear layer of the base model, with its weight in the layout that the device multiplies best.

Knows nothing of adapters: they are added to its output.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

PACKED_FOR_NUM_ROWS = 32
"""Rows of x that oneDNN lays the weight out for; any number may be multiplied."""


class Linear:
    """y = x Wᵀ + b, rounded once to x's dtype.

    bf16 weights on a CPU that multiplies bf16 are kept only in oneDNN's blocked layout, which beats
    the plain one by 1.2-2.2 times; others stay as they are. For a given number of rows, a row of y
    depends on the same row of x alone, bit for bit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [O, I], contiguous; bias [O], of the same dtype and device.

        Raises ValueError on shapes that do not match.
        """
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            shape = None if bias is None else list(bias.shape)
            raise ValueError(f"weight {list(weight.shape)} and bias {shape}: not [O, I] and [O]")
        self.out_features, self.in_features = weight.shape
        self.is_packed = _can_pack(weight)
        self._weight = _pack(weight) if self.is_packed else weight
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I]; returns [T, O] in the same dtype, contiguous."""
        if not self.is_packed:
            return torch.nn.functional.linear(x, self._weight, self._bias)
        multiply = torch.ops.mkldnn._linear_pointwise
        return cast(Tensor, multiply(x, self._weight, self._bias, "none", [], ""))


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_NUM_ROWS))
