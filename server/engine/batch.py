"""A step's plan as the tensors that the model and the kernels read.

Built once a step on the host, from integers, and copied to the device at once; every layer reads
the same tensors.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from kernels.layout import AdapterIndex, AttentionIndex
from server.engine.packing import to_device
from server.model.decoder import StepInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from server.engine.packing import Array
    from server.engine.scheduler import PlannedSequence, StepPlan
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache


def build(plan: StepPlan, kv_cache: KVCache, adapters: AdapterPool, storage: Tensor) -> StepInput:
    """The step's input on the device of `storage`, tokens in the order of the plan's items."""
    segments, num_base = _segments(plan.items)
    arrays = _token_arrays(plan.items, kv_cache)
    max_context = int(arrays["context_len"].max())
    arrays["segment_start"] = num_base + np.cumsum([0, *(n for _, n in segments)], dtype=np.int32)
    arrays["segment_slot"] = np.array([slot for slot, _ in segments], dtype=np.int32)
    tensors = to_device(arrays, storage.device)
    return StepInput(
        token_ids=tensors["token_ids"],
        positions=tensors["positions"],
        kv_slot=tensors["kv_slot"],
        logit_rows=tensors["logit_rows"],
        attention=AttentionIndex(
            query_start=tensors["query_start"],
            context_len=tensors["context_len"],
            block_table=tensors["block_table"],
            decode=tensors["decode"],
            prefill=tensors["prefill"],
            max_query=max(i.num_tokens for i in plan.items),
            max_context=max_context,
        ),
        adapters=AdapterIndex(
            token_slot=tensors["token_slot"],
            segment_start=tensors["segment_start"],
            segment_slot=tensors["segment_slot"],
            num_base=num_base,
            max_segment=max((n for _, n in segments), default=0),
            max_span_rows=max((adapters.max_span_rows(slot) for slot, _ in segments), default=0),
        ),
        rows=adapters.rows,
        storage=storage,
    )


def _token_arrays(items: Sequence[PlannedSequence], kv_cache: KVCache) -> dict[str, Array]:
    """What there is for each token and each sequence, by its name in StepInput and its indices."""
    block_size = kv_cache.block_size
    counts = np.array([i.num_tokens for i in items])
    starts = np.array([i.start for i in items])
    samples = np.array([i.samples for i in items])
    slots = np.array([i.slot for i in items], dtype=np.int32)
    query_start = np.concatenate([[0], counts.cumsum()])
    sequence = np.repeat(np.arange(len(items)), counts)  # of each token
    positions = np.arange(query_start[-1]) + (starts - query_start[:-1])[sequence]
    block_table = _block_table(items, kv_cache)
    pages = block_table[sequence, positions // block_size].astype(np.int64)
    return {
        "token_ids": np.array(_token_ids(items)),
        "positions": positions.astype(np.int32),
        "kv_slot": pages * block_size + positions % block_size,
        "logit_rows": query_start[1:][samples] - 1,
        "query_start": query_start.astype(np.int32),
        "context_len": (starts + counts).astype(np.int32),
        "block_table": block_table,
        "decode": np.flatnonzero(counts == 1).astype(np.int32),
        "prefill": np.flatnonzero(counts != 1).astype(np.int32),
        "token_slot": slots[sequence],
    }


def _token_ids(items: Sequence[PlannedSequence]) -> list[int]:
    return [t for i in items for t in i.sequence.token_ids[i.start : i.start + i.num_tokens]]


def _block_table(items: Sequence[PlannedSequence], kv_cache: KVCache) -> Array:
    """The page of every block of every sequence, [S, max_blocks] int32, 0 where there is none."""
    tables = [kv_cache.table(i.sequence.request_id) for i in items]
    block_table = np.zeros((len(items), max(len(table) for table in tables)), dtype=np.int32)
    for row, table in zip(block_table, tables, strict=True):
        row[: len(table)] = table
    return block_table


def _segments(items: Sequence[PlannedSequence]) -> tuple[list[tuple[int, int]], int]:
    """Slot and length of each run of tokens of one adapter; and the number of base tokens."""
    runs = [
        (slot, sum(i.num_tokens for i in run)) for slot, run in groupby(items, lambda i: i.slot)
    ]
    return [run for run in runs if run[0] >= 0], sum(n for slot, n in runs if slot < 0)
