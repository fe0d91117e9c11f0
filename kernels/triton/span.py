"""The output columns of a span's targets cut into blocks, so that one launch covers them all."""

# mypy: disable-error-code="untyped-decorator"

from itertools import pairwise

import triton
import triton.language as tl

from kernels.triton.launch import cdiv

UNSPECIALIZED = (
    "num_segments",
    "num_base",
    "first_target",
    "num_splits",
    "split_blocks",
    "stride_ys",
    "stride_yt",
    "stride_ps",
    "stride_os",
)
"""Arguments of the adapter kernels that change from step to step: their values compile nothing."""


def num_column_blocks(out_start: tuple[int, ...], block: int) -> int:
    """Blocks of `block` columns that cover every target; none lies in two targets."""
    return sum(cdiv(stop - start, block) for start, stop in pairwise(out_start))


@triton.jit
def find_column_block(
    index: tl.tensor,
    OUT_START: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The target of block `index`, its first output column and width, and the block within it."""
    target = 0
    start = 0
    width = 0
    first_block = 0
    next_block = 0
    for j in tl.static_range(NUM_TARGETS):
        inside = index >= next_block
        target = tl.where(inside, j, target)
        start = tl.where(inside, OUT_START[j], start)
        width = tl.where(inside, OUT_START[j + 1] - OUT_START[j], width)
        first_block = tl.where(inside, next_block, first_block)
        next_block += (OUT_START[j + 1] - OUT_START[j] + BLOCK_O - 1) // BLOCK_O
    return target, start, width, index - first_block
