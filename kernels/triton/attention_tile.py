"""One tile of queries against a range of paged keys: the online softmax that attention shares."""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
"""Scores are kept in base 2: softmax(s) = 2^(s · log2 e - max) / Σ."""

UNSPECIALIZED = ("window", "split_keys", "num_splits", "stride_bs")
"""Arguments of the kernels that change from step to step: their values compile nothing."""


@triton.jit
def attend(
    q: tl.tensor,
    position: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    kv_head_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    stride_page: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Σ 2^(scale · q kᵀ - max) v, with max and Σ 2^(...), of the keys first_key .. last_key - 1.

    q [BLOCK_M, HEAD_DIM]; position [BLOCK_M]: a row sees keys up to its position and, if
    WINDOWED, the last `window` of them; scale holds log2 e. Returns acc [BLOCK_M, HEAD_DIM],
    row_max [BLOCK_M], row_sum [BLOCK_M], fp32; a row that sees no key has sum 0, max -inf.
    """
    column = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(first_key, last_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        in_range = key < last_key
        page = tl.load(table_ptr + key // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
        k_row = page * stride_page + key % BLOCK_SIZE * (NUM_KV_HEADS * HEAD_DIM)
        k_ptrs = kv_head_ptr + k_row[:, None] + column[None, :]
        k = tl.load(k_ptrs, mask=in_range[:, None], other=0.0)  # [BLOCK_N, HEAD_DIM]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = in_range[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # no key seen yet: no NaN
        weights = tl.exp2(scores - shift[:, None])
        keep = tl.exp2(row_max - shift)
        row_sum = row_sum * keep + tl.sum(weights, axis=1)
        v_ptrs = k_ptrs + BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM
        v = tl.load(v_ptrs, mask=in_range[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum
