"""Rows of several adapters in one slot are the weighted sum of their deltas."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.layout import AdapterIndex, TargetSpan
from server.memory.image_file import RankTable
from server.memory.row_table import RowTable, combine

SIZE = 8  # in and out features of every target of the toy layout
NUM_PAGES = 40


def adapter(layout, ranks, seed: int, first_page: int) -> tuple[RankTable, list[int]]:
    """A table of the image of an adapter with these ranks by entry, and pages that it may have."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(ranks)
    row_ptr = torch.tensor([0, *ranks]).cumsum(0).to(torch.int32)
    # Rows lie in any order.
    offsets = torch.randperm(num_rows, generator=generator) * 2 * SIZE
    scales = torch.rand(num_rows, generator=generator) + 0.5
    num_pages = -(-num_rows * 2 * SIZE // layout.page_elements)
    pages = list(range(first_page + num_pages - 1, first_page - 1, -1))
    return RankTable(row_ptr, offsets, scales), pages


def dense(storage, table: RankTable, entry: int) -> torch.Tensor:
    """sum of scale · b aᵀ over the entry's rows, [out, in] fp64."""
    flat = storage.flatten().double()
    delta = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for i in range(int(table.row_ptr[entry]), int(table.row_ptr[entry + 1])):
        start = int(table.row_offset[i])
        a, b = flat[start : start + SIZE], flat[start + SIZE : start + 2 * SIZE]
        delta += table.row_scale[i].double() * torch.outer(b, a)
    return delta


@pytest.fixture
def storage(layout):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(NUM_PAGES, layout.page_elements, generator=generator)


@pytest.fixture
def three(layout):
    """Table and tables of three adapters: mixed ranks, some of none, one of nothing at all."""
    num_entries = layout.num_layers * len(layout.targets)
    table = RowTable(4, 128, layout, torch.device("cpu"))
    ranks = ([3] * num_entries, [i % 4 for i in range(num_entries)], [0] * num_entries)
    made = [adapter(layout, each, seed, 15 * seed) for seed, each in enumerate(ranks)]
    return table, [table.locate(*each) for each in made]


def test_located_rows_are_those_of_the_pages_that_the_image_was_copied_to(layout, three):
    table, _ = three
    rows = RankTable(torch.zeros(15, dtype=torch.int32), torch.tensor([0, 16, 64, 80]), None)
    assert table.locate(rows, [7, 2]).row_offset.tolist() == [448, 464, 128, 144]


def test_combined_rows_are_the_weighted_sum_of_the_dense_deltas(layout, three, storage):
    table, tables = three
    weights = [0.7, -2.5, 3.0]
    table.install(1, combine(tables, weights))
    rows = table.rows
    num_targets = len(layout.targets)
    x = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(9))
    index = AdapterIndex(
        token_slot=torch.tensor([-1, 1, 1, 1, 1], dtype=torch.int32),
        segment_start=torch.tensor([1, 5], dtype=torch.int32),
        segment_slot=torch.tensor([1], dtype=torch.int32),
        num_base=1,
        max_segment=4,
        max_span_rows=table.max_span_rows[1],
    )
    for entry in range(layout.num_layers * num_targets):
        out = torch.zeros(5, SIZE)
        span = TargetSpan(entry, (0, SIZE))
        reference.add_adapters(out, x, storage, rows, index, span)
        delta = sum(
            weight * dense(storage, each, entry)
            for weight, each in zip(weights, tables, strict=True)
        )
        torch.testing.assert_close(
            out[1:], (x[1:].double() @ delta.T).float(), rtol=1e-5, atol=1e-5
        )
        assert not out[0].any()


def test_the_rows_of_an_entry_come_in_the_order_of_the_tables(three):
    _, tables = three
    both = combine(tables[:2], [1.0, 2.0])
    first, second = (range(int(t.row_ptr[3]), int(t.row_ptr[4])) for t in tables[:2])
    here = range(int(both.row_ptr[3]), int(both.row_ptr[4]))
    wanted = [*tables[0].row_offset[list(first)], *tables[1].row_offset[list(second)]]
    assert both.row_offset[list(here)].tolist() == [int(each) for each in wanted]


def test_a_scale_is_rounded_once_to_fp32(three):
    _, tables = three
    scales = combine([tables[0]], [0.1]).row_scale
    assert scales.dtype == torch.float32
    assert torch.equal(scales, (tables[0].row_scale.double() * 0.1).float())


def test_a_combination_with_an_adapter_of_no_rows_is_the_other(three):
    _, tables = three
    both = combine([tables[2], tables[1]], [5.0, 1.0])
    for one, other in zip(both, tables[1], strict=True):
        assert torch.equal(one, other)


def test_a_cleared_slot_has_no_rows(three):
    table, tables = three
    table.install(2, combine(tables, [1.0, 1.0, 1.0]))
    assert table.max_span_rows[2] > 9
    table.clear(2)
    table.check(2, [])
    assert table.max_span_rows[2] == 0
