"""What the kernels index: rank rows in pages, KV blocks in pages, and the indices of one step.

Needs no torch at run time, so that code which only writes the layout stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

ROW_ALIGNMENT = 8
"""Elements to which `a` and `b` of a rank row are padded: 16 bytes at 16 bits, one GPU load."""


def aligned(num_features: int) -> int:
    """`num_features` rounded up to ROW_ALIGNMENT."""
    return -(-num_features // ROW_ALIGNMENT) * ROW_ALIGNMENT


def row_elements(in_features: int, out_features: int) -> int:
    """Elements of one rank row: `a` [in_features], then `b` [out_features], each aligned."""
    return aligned(in_features) + aligned(out_features)


class RankRows(NamedTuple):
    """Where the rank rows of every slot lie, as CSR over (layer, target).

    Row i of slot s belongs to (layer l, target t) when
    row_ptr[s, l * num_targets + t] <= i < row_ptr[s, l * num_targets + t + 1].
    Its `a` begins at element row_offset[s, i] of the flat page storage, its `b` at
    row_offset[s, i] + aligned(in_features); `b` is a column of PEFT's lora_B.
    """

    row_ptr: Tensor  # [num_slots, num_layers * num_targets + 1] int32
    row_offset: Tensor  # [num_slots, max_rows] int64, multiples of ROW_ALIGNMENT
    row_scale: Tensor  # [num_slots, max_rows] fp32: the row's scaling (alpha / r, ...)


class TargetSpan(NamedTuple):
    """Consecutive targets of one layer that share their input, as q,k,v or gate,up do.

    Target j of the span writes output columns out_start[j] .. out_start[j + 1].
    """

    first: int  # layer * num_targets + index of the first target: a column of row_ptr
    out_start: tuple[int, ...]  # [num_span_targets + 1]


class AdapterIndex(NamedTuple):
    """Which slot each token of a step uses; built once a step, read by every layer.

    Tokens of one slot are consecutive, base tokens (slot -1) come first.
    """

    token_slot: Tensor  # [T] int32; -1 = base model
    segment_start: Tensor  # [S + 1] int32: runs of tokens of one slot, base run left out
    segment_slot: Tensor  # [S] int32, never -1
    num_base: int  # tokens before segment_start[0]
    max_segment: int  # longest segment, in tokens; 0 when no token has an adapter
    max_span_rows: int  # most rows that any span of any slot of the step has


class RowReads(NamedTuple):
    """The rank rows that the call after this one will read: a hint to ask for them in time."""

    storage: Tensor
    rows: RankRows
    adapters: AdapterIndex
    span: TargetSpan
    num_inputs: int  # of the span's targets


class AttentionIndex(NamedTuple):
    """Where each sequence's tokens of a step lie in the batch and in the KV pages."""

    query_start: Tensor  # [S + 1] int32: tokens of sequence s are query_start[s] .. [s + 1]
    context_len: Tensor  # [S] int32: tokens in the KV cache after this step's are stored
    block_table: Tensor  # [S, max_blocks] int32: page of each block; unused entries are 0
    decode: Tensor  # [D] int32: sequences with exactly one query token
    prefill: Tensor  # [P] int32: the others
    max_query: int
    max_context: int
