"""The table on the device of where the rank rows of each slot lie.

Knows slots and pages; not which adapter has them, nor why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.layout import RankRows
from server.memory.image_file import RankTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adapters_store.layout import BaseLayout

_SPAN = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}
"""Targets that share their input are one span: one launch of the adapter kernels."""


class RowTable:
    """`rows` of all slots, and the most rows that a span of each slot has, on the host.

    Invariant: the rows of a slot are those that `install` was given last for it; a cleared slot
    has none.
    """

    def __init__(
        self, num_slots: int, max_rows: int, layout: BaseLayout, device: torch.device
    ) -> None:
        num_entries = layout.num_layers * len(layout.targets)
        self.rows = RankRows(
            torch.zeros(num_slots, num_entries + 1, dtype=torch.int32, device=device),
            torch.zeros(num_slots, max_rows, dtype=torch.int64, device=device),
            torch.zeros(num_slots, max_rows, dtype=torch.float32, device=device),
        )
        self.max_span_rows = [0] * num_slots
        self._page_elements = layout.page_elements
        self._span_columns = _span_columns(layout)

    @property
    def max_rows(self) -> int:
        """Most rank rows that one slot has room for."""
        return self.rows.row_offset.shape[1]

    def locate(self, table: RankTable, pages: Sequence[int]) -> RankTable:
        """The rows of an image whose page i was copied to pages[i], with offsets in the pool."""
        size = self._page_elements
        page = torch.tensor(pages, dtype=torch.int64)[table.row_offset // size]
        return table._replace(row_offset=page * size + table.row_offset % size)

    def install(self, slot: int, table: RankTable) -> None:
        """Make the slot's rows those of a table on the host, its offsets in the pool."""
        num_rows = len(table.row_offset)
        self.rows.row_ptr[slot].copy_(table.row_ptr)
        self.rows.row_offset[slot, :num_rows].copy_(table.row_offset)
        self.rows.row_scale[slot, :num_rows].copy_(table.row_scale)
        self.max_span_rows[slot] = self._count_span_rows(table.row_ptr)

    def clear(self, slot: int) -> None:
        """Leave the slot without rows."""
        self.rows.row_ptr[slot].zero_()
        self.max_span_rows[slot] = 0

    def check(self, slot: int, pages: Sequence[int]) -> None:
        """Recompute the invariant for a slot that has `pages`; AssertionError if it is broken."""
        row_ptr = self.rows.row_ptr[slot].cpu()
        offsets = self.rows.row_offset[slot, : int(row_ptr[-1])].cpu()
        outside = set((offsets // self._page_elements).tolist()) - set(pages)
        assert not outside, f"slot {slot} has rows in pages {outside}, which are not its own"
        assert self.max_span_rows[slot] == self._count_span_rows(row_ptr)

    def _count_span_rows(self, row_ptr: Tensor) -> int:
        return int(row_ptr[self._span_columns].diff(dim=1).max())


def combine(tables: Sequence[RankTable], weights: Sequence[float]) -> RankTable:
    """The rows of all tables where they lie, each scale multiplied by its table's weight.

    So a combination is sum over k of weight_k · scale_k · B_k A_k, exactly: the rows of one (layer,
    target) come one after the other, in the order of the tables. At least one table, on the host.
    The product of a scale and a weight is rounded once, to fp32.
    """
    counts = torch.stack([table.row_ptr.diff() for table in tables])  # [K, entries]
    row_ptr = torch.zeros_like(tables[0].row_ptr)
    row_ptr[1:] = counts.sum(dim=0).cumsum(dim=0)
    entries = torch.arange(counts.shape[1])
    order = torch.cat([entries.repeat_interleave(n) for n in counts]).argsort(stable=True)
    scales = [table.row_scale.double() * w for table, w in zip(tables, weights, strict=True)]
    return RankTable(
        row_ptr,
        torch.cat([table.row_offset for table in tables])[order],
        torch.cat(scales)[order].float(),
    )


def _span_columns(layout: BaseLayout) -> Tensor:
    """Where spans begin in row_ptr, [num_layers, num_spans + 1] int64."""
    spans = [_SPAN[target.name] for target in layout.targets]
    first = [i for i, span in enumerate(spans) if i == 0 or spans[i - 1] != span]
    layers = torch.arange(layout.num_layers)[:, None] * len(spans)
    return layers + torch.tensor([*first, len(spans)])
