"""SiLU of the gate times up, of the fused gate,up projection's output."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import cdiv, check_rows

BLOCK_COLUMNS = 2048


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, in fp32, rounded once.

    gate_up [T, 2I], gate first, rows contiguous; returns [T, I] in the same dtype. Raises
    ValueError on rows that are not contiguous.
    """
    check_rows(gate_up=gate_up)
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    _silu_mul_kernel[(num_tokens, cdiv(width, BLOCK_COLUMNS))](
        out,
        gate_up,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK_C=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _silu_mul_kernel(
    out_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    stride_gt: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < WIDTH
    row_ptr = gate_up_ptr + token * stride_gt
    gate = tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * WIDTH + column, product.to(out_ptr.dtype.element_ty), mask=mask)
