"""The choice between BGMV and SGMV for a step, and the scratch between shrink and expand."""

import torch
from torch import Tensor

from kernels.layout import AdapterIndex, RankRows, TargetSpan
from kernels.triton.bgmv import bgmv_expand, bgmv_shrink
from kernels.triton.launch import check_dtypes, check_rows
from kernels.triton.sgmv import sgmv_expand, sgmv_shrink

MIN_SGMV_SEGMENT = 16
"""Tokens of one adapter from which its rank rows are worth a tensor core's tile."""

SPLIT_INPUTS = 1024
MAX_SPLITS = 8
MAX_SPLIT_TOKENS = 256


def add_adapters(
    out: Tensor,
    x: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
) -> None:
    """out[t] += ΔW[slot[t]] x[t] for every token with a slot, in two launches; none without one.

    x [T, I], out [T, O]: rows contiguous, one dtype with storage, which is contiguous; no program
    is started for a base token. Deterministic: nothing is summed atomically. Raises ValueError on
    another layout, dtype or device.
    """
    check_rows(out=out, x=x, storage=storage)
    check_dtypes(x=x, out=out, storage=storage)
    num_tokens = x.shape[0] - index.num_base
    if num_tokens == 0 or index.max_span_rows == 0:
        return
    num_splits = num_input_splits(x.shape[1], num_tokens)
    shape = (num_splits, num_tokens, index.max_span_rows)
    y = torch.empty(shape, dtype=torch.float32, device=x.device)
    if index.max_segment < MIN_SGMV_SEGMENT:
        bgmv_shrink(y, x, storage, rows, index, span)
        bgmv_expand(out, y, storage, rows, index, span, x.shape[1])
    else:
        sgmv_shrink(y, x, storage, rows, index, span)
        sgmv_expand(out, y, storage, rows, index, span, x.shape[1])


def num_input_splits(in_features: int, num_tokens: int) -> int:
    """Parts that the inputs are cut into, so that few tokens still start enough programs."""
    if num_tokens > MAX_SPLIT_TOKENS:
        return 1
    return min(max(in_features // SPLIT_INPUTS, 1), MAX_SPLITS)
