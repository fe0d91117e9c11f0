"""RMSNorm, alone or with the addition to the residual stream fused in."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import check_rows, next_power_of_2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in fp32, rounded once.

    x [T, H], rows contiguous; weight [H]; returns [T, H] in x's dtype. Raises ValueError on rows
    that are not contiguous.
    """
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place and rounded to its dtype; returns rms_norm(residual).

    x, residual [T, H], rows contiguous; weight [H]; returns [T, H] in residual's dtype.
    Raises ValueError on rows that are not contiguous.
    """
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    check_rows(x=x, weight=weight)
    stream = x if residual is None else residual
    check_rows(residual=stream)
    num_tokens, hidden = x.shape
    out = torch.empty((num_tokens, hidden), dtype=stream.dtype, device=x.device)
    if num_tokens == 0:
        return out
    block = next_power_of_2(hidden)
    _rms_norm_kernel[(num_tokens,)](
        out,
        x,
        stream,
        weight,
        eps,
        x.stride(0),
        stream.stride(0),
        HIDDEN=hidden,
        BLOCK_H=block,
        ADD=residual is not None,
        num_warps=min(max(block // 512, 1), 8),
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _rms_norm_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    eps: tl.tensor,
    stride_xt: tl.tensor,
    stride_rt: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    mask = column < HIDDEN
    x = tl.load(x_ptr + token * stride_xt + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual_row = residual_ptr + token * stride_rt + column
        x += tl.load(residual_row, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, rounded, mask=mask)
        x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    x *= tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, x.to(out_ptr.dtype.element_ty), mask=mask)
