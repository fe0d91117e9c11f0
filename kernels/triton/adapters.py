"""The adapters' part of a step: the choice of BGMV or SGMV and its tiles, and the two launches."""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.layout import AdapterIndex, RankRows, TargetSpan
from kernels.triton.bgmv import bgmv_expand, bgmv_shrink
from kernels.triton.launch import check_dtypes, check_rows
from kernels.triton.sgmv import sgmv_expand, sgmv_shrink
from kernels.triton.tiles import Tiling, Work, rule_tiling
from kernels.triton.tuned import tuned_tiling


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
    is started for the first num_base tokens. Deterministic: nothing is summed atomically. Raises
    ValueError on another layout, dtype or device.

    A captured graph replays the launches with other slots. For it num_base is 0, max_segment 1
    (BGMV) and max_span_rows the most that may come; tokens of slot -1 may then lie anywhere:
    their programs end at once and neither read nor write their rows of x and out.
    """
    check_rows(out=out, x=x, storage=storage)
    check_dtypes(x=x, out=out, storage=storage)
    num_tokens = x.shape[0] - index.num_base
    if num_tokens == 0 or index.max_span_rows == 0:
        return
    work = Work(
        num_tokens=num_tokens,
        num_segments=len(index.segment_slot),
        max_segment=index.max_segment,
        max_span_rows=index.max_span_rows,
        in_features=x.shape[1],
        out_start=span.out_start,
        itemsize=x.itemsize,
    )
    run_tiling(choose_tiling(work, _device_name(x.device)), out, x, storage, rows, index, span)


@lru_cache(maxsize=4096)
def choose_tiling(work: Work, device_name: str) -> Tiling:
    """The tiling of `work`: measured on such a device where it was, or else by the rules."""
    return tuned_tiling(work, device_name) or rule_tiling(work)


def run_tiling(
    tiling: Tiling,
    out: Tensor,
    x: Tensor,
    storage: Tensor,
    rows: RankRows,
    index: AdapterIndex,
    span: TargetSpan,
) -> None:
    """`add_adapters` with a given tiling of a step that has tokens with adapters."""
    shape = (tiling.num_splits, x.shape[0] - index.num_base, index.max_span_rows)
    y = torch.empty(shape, dtype=torch.float32, device=x.device)
    if tiling.method == "bgmv":
        bgmv_shrink(y, x, storage, rows, index, span, tiling)
        bgmv_expand(out, y, storage, rows, index, span, x.shape[1], tiling)
    else:
        sgmv_shrink(y, x, storage, rows, index, span, tiling)
        sgmv_expand(out, y, storage, rows, index, span, x.shape[1], tiling)


@lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
