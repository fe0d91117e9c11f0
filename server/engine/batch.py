"""A step's plan as the tensors that the model and the kernels read.

Built once a step on the host, from integers; every layer reads the same tensors.
"""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.layout import AdapterIndex, AttentionIndex
from server.model.decoder import StepInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from server.engine.scheduler import PlannedSequence, StepPlan
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache


def build(plan: StepPlan, kv_cache: KVCache, adapters: AdapterPool, storage: Tensor) -> StepInput:
    """The step's input on the device of `storage`, tokens in the order of the plan's items."""
    device, block_size, items = storage.device, kv_cache.block_size, plan.items
    tables = [np.array(kv_cache.table(i.sequence.request_id), dtype=np.int64) for i in items]
    spans = [np.arange(i.start, i.start + i.num_tokens) for i in items]
    token_ids = [
        token for i in items for token in i.sequence.token_ids[i.start : i.start + i.num_tokens]
    ]
    kv_slot = [
        table[span // block_size] * block_size + span % block_size
        for table, span in zip(tables, spans, strict=True)
    ]
    query_start = list(accumulate((i.num_tokens for i in items), initial=0))
    last_tokens = [stop - 1 for stop, i in zip(query_start[1:], items, strict=True) if i.samples]
    return StepInput(
        token_ids=_tensor(token_ids, np.int64, device),
        positions=_tensor(np.concatenate(spans), np.int32, device),
        kv_slot=_tensor(np.concatenate(kv_slot), np.int64, device),
        logit_rows=_tensor(last_tokens, np.int64, device),
        attention=_attention_index(items, query_start, tables, device),
        adapters=_adapter_index(items, adapters, device),
        rows=adapters.rows,
        storage=storage,
    )


def _attention_index(
    items: Sequence[PlannedSequence],
    query_start: list[int],
    tables: list[np.ndarray],
    device: torch.device,
) -> AttentionIndex:
    context_len = [i.start + i.num_tokens for i in items]
    block_table = np.zeros((len(items), max(len(table) for table in tables)), dtype=np.int32)
    for row, table in zip(block_table, tables, strict=True):
        row[: len(table)] = table
    return AttentionIndex(
        query_start=_tensor(query_start, np.int32, device),
        context_len=_tensor(context_len, np.int32, device),
        block_table=_tensor(block_table, np.int32, device),
        decode=_tensor([n for n, i in enumerate(items) if i.num_tokens == 1], np.int32, device),
        prefill=_tensor([n for n, i in enumerate(items) if i.num_tokens != 1], np.int32, device),
        max_query=max(i.num_tokens for i in items),
        max_context=max(context_len),
    )


def _adapter_index(
    items: Sequence[PlannedSequence], adapters: AdapterPool, device: torch.device
) -> AdapterIndex:
    runs = [
        (slot, sum(i.num_tokens for i in run)) for slot, run in groupby(items, lambda i: i.slot)
    ]
    num_base = sum(length for slot, length in runs if slot < 0)
    segments = [(slot, length) for slot, length in runs if slot >= 0]
    starts = list(accumulate((length for _, length in segments), initial=num_base))
    token_slot = np.repeat([slot for slot, _ in runs], [length for _, length in runs])
    return AdapterIndex(
        token_slot=_tensor(token_slot, np.int32, device),
        segment_start=_tensor(starts, np.int32, device),
        segment_slot=_tensor([slot for slot, _ in segments], np.int32, device),
        num_base=num_base,
        max_segment=max((length for _, length in segments), default=0),
        max_span_rows=max((adapters.max_span_rows(slot) for slot, _ in segments), default=0),
    )


def _tensor(values: Sequence[int] | np.ndarray, dtype: type, device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
