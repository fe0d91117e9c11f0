"""A decode step of fixed size in memory that never moves: what a captured graph reads.

Each row is the one token of a sequence, or padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.layout import AdapterIndex, AttentionIndex
from server.engine.packing import Field, Packing, staging_buffer
from server.model.decoder import StepInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.layout import RankRows
    from server.engine.scheduler import PlannedSequence
    from server.memory.kv_cache import KVCache


class DecodeBatch:
    """Up to `num_rows` sequences of up to `max_context` tokens.

    Padding is one base token at position 0 of the scratch page, which no sequence has: it reads
    and writes there and nowhere else. The numbers of `step` that a launch depends on are upper
    bounds, so that one launch fits whatever is loaded.
    Invariant: the tensors of `step` never move; `load` alone changes what lies in them.
    """

    def __init__(
        self,
        num_rows: int,
        max_context: int,
        max_span_rows: int,
        rows: RankRows,
        storage: Tensor,
        scratch_page: int,
        block_size: int,
    ) -> None:
        """All rows are padding. `max_span_rows` as in AdapterIndex, of any slot."""
        self.num_rows = num_rows
        self.max_context = max_context
        self._block_size = block_size
        self._packing = Packing(
            {
                "token_ids": Field("int64", (num_rows,)),
                "kv_slot": Field("int64", (num_rows,)),
                "positions": Field("int32", (num_rows,)),
                "context_len": Field("int32", (num_rows,)),
                "token_slot": Field("int32", (num_rows,)),
                "block_table": Field("int32", (num_rows, -(-max_context // block_size))),
            }
        )
        self._padding = np.zeros(self._packing.num_bytes, dtype=np.uint8)
        arrays = self._packing.arrays(self._padding)
        arrays["kv_slot"][:] = scratch_page * block_size
        arrays["context_len"][:] = 1
        arrays["token_slot"][:] = -1
        arrays["block_table"][:] = scratch_page
        self._buffer = torch.from_numpy(self._padding.copy()).to(storage.device)
        self.step = self._build_step(max_span_rows, rows, storage)

    def load(self, items: Sequence[PlannedSequence], kv_cache: KVCache) -> None:
        """Make the first rows those of `items`, each of one token, and the others padding.

        One copy, which the host does not wait for.
        """
        staging = staging_buffer(self._packing.num_bytes, self._buffer.device)
        flat = staging.numpy()
        flat[:] = self._padding
        arrays, used = self._packing.arrays(flat), slice(len(items))
        starts = np.array([i.start for i in items])
        block_table = arrays["block_table"]
        for row, item in zip(block_table, items, strict=False):
            table = kv_cache.table(item.sequence.request_id)
            row[: len(table)] = table
        pages = block_table[np.arange(len(items)), starts // self._block_size].astype(np.int64)
        arrays["token_ids"][used] = [i.sequence.token_ids[i.start] for i in items]
        arrays["kv_slot"][used] = pages * self._block_size + starts % self._block_size
        arrays["positions"][used] = starts
        arrays["context_len"][used] = starts + 1
        arrays["token_slot"][used] = [i.slot for i in items]
        self._buffer.copy_(staging, non_blocking=True)

    def _build_step(self, max_span_rows: int, rows: RankRows, storage: Tensor) -> StepInput:
        tensors = self._packing.tensors(self._buffer)
        device = storage.device
        count = torch.arange(self.num_rows + 1, dtype=torch.int32, device=device)
        return StepInput(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            kv_slot=tensors["kv_slot"],
            logit_rows=torch.arange(self.num_rows, device=device),
            attention=AttentionIndex(
                query_start=count,
                context_len=tensors["context_len"],
                block_table=tensors["block_table"],
                decode=count[:-1],
                prefill=count[:0],
                max_query=1,
                max_context=self.max_context,
            ),
            # Every token is a segment of its own, those without an adapter too: which they are
            # changes from step to step, and the launches must not.
            adapters=AdapterIndex(
                token_slot=tensors["token_slot"],
                segment_start=count,
                segment_slot=tensors["token_slot"],
                num_base=0,
                max_segment=1,
                max_span_rows=max_span_rows,
            ),
            rows=rows,
            storage=storage,
        )
