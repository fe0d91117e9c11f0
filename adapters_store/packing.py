"""Where each rank row goes: rows into pages so that none straddles one and little is lost.

Rows mostly stay in their order. The end of each page is filled with the combination of the
coming rows' sizes that fits best, found by a bounded subset sum; so each page but the last is
full, or as full as the sizes allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from adapters_store.layout import BaseLayout
from kernels.layout import ROW_ALIGNMENT, row_elements

TAIL_ROWS = 8
"""Largest rows whose room at the end of a page is filled by combination."""


@dataclass(frozen=True, slots=True)
class Packing:
    """row_offset[i] is the element at which row i begins, pages laid end to end."""

    row_offset: tuple[int, ...]
    num_pages: int
    waste: float  # share of the pages' elements that belongs to no row


def check_layout(layout: BaseLayout) -> None:
    """ValueError where no image can be packed for the layout."""
    largest = max(row_elements(t.in_features, t.out_features) for t in layout.targets)
    if layout.page_elements % ROW_ALIGNMENT:
        raise ValueError(
            f"page_elements is {layout.page_elements}: it must be a multiple of {ROW_ALIGNMENT}"
        )
    if largest > layout.page_elements:
        raise ValueError(
            f"a rank row of {layout.model_name} has up to {largest} elements, a page only "
            f"{layout.page_elements}: raise block_size"
        )


def row_sizes(layout: BaseLayout, ranks: dict[tuple[int, str], int]) -> list[int]:
    """Elements of every row in table order; ranks by (layer, target), 0 where one is absent."""
    return [
        size
        for layer in range(layout.num_layers)
        for target in layout.targets
        for size in [row_elements(target.in_features, target.out_features)]
        * ranks.get((layer, target.name), 0)
    ]


def pack_rows(sizes: Sequence[int], page_elements: int) -> Packing:
    """Place rows of these sizes (elements, each at most page_elements)."""
    if sizes and max(sizes) > page_elements:
        raise ValueError(f"a row of {max(sizes)} elements exceeds a page of {page_elements}")
    waiting = _WaitingRows(sizes)
    row_offset = [0] * len(sizes)
    num_pages = 0
    while waiting.num_elements:
        position = num_pages * page_elements
        for row in waiting.take_page(page_elements):
            row_offset[row] = position
            position += sizes[row]
        num_pages += 1
    total = num_pages * page_elements
    return Packing(tuple(row_offset), num_pages, 1 - sum(sizes) / total if total else 0.0)


class _WaitingRows:
    """The rows that have no place yet, in order, and by size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._by_size: dict[int, deque[int]] = {}
        for row, size in enumerate(sizes):
            self._by_size.setdefault(size, deque()).append(row)
        self.num_elements = sum(sizes)

    def take_page(self, page_elements: int) -> list[int]:
        """The rows of the next page, in order."""
        if self.num_elements <= page_elements:
            return self._take({size: len(rows) for size, rows in self._by_size.items()})
        gap = page_elements
        head: list[int] = []
        tail_elements = TAIL_ROWS * max(size for size, rows in self._by_size.items() if rows)
        while gap > tail_elements:
            row = min(rows[0] for rows in self._by_size.values() if rows)
            head += self._take({self._sizes[row]: 1})
            gap -= self._sizes[row]
        tail = best_fill(gap, {size: len(rows) for size, rows in self._by_size.items() if rows})
        return sorted(head + self._take(tail))

    def _take(self, counts: dict[int, int]) -> list[int]:
        """The first rows of each size, in order of their rows."""
        taken = [
            self._by_size[size].popleft() for size, count in counts.items() for _ in range(count)
        ]
        self.num_elements -= sum(self._sizes[row] for row in taken)
        return sorted(taken)


def best_fill(gap: int, available: dict[int, int]) -> dict[int, int]:
    """Counts by size whose sum is the largest possible one that is at most `gap`.

    available: how many rows of each size there are. Bounded subset sum: bit s of `reachable`
    says whether s units can be filled; small sizes are kept for later pages where possible.
    """
    unit = gcd(*available)
    chunks = [
        (size, count)
        for size in sorted(available, reverse=True)
        for count in _doubling(min(available[size], gap // size))
    ]
    mask = (1 << (gap // unit + 1)) - 1
    reachable = [1]
    for size, count in chunks:
        reachable.append((reachable[-1] | reachable[-1] << (size * count // unit)) & mask)
    filled = reachable[-1].bit_length() - 1
    counts: dict[int, int] = {}
    for i in reversed(range(len(chunks))):
        if not reachable[i] >> filled & 1:
            size, count = chunks[i]
            counts[size] = counts.get(size, 0) + count
            filled -= size * count // unit
    return counts


def _doubling(total: int) -> list[int]:
    """Parts 1, 2, 4, … and a rest, whose subset sums are 0 .. total."""
    parts = []
    part = 1
    while total > 0:
        parts.append(min(part, total))
        total -= parts[-1]
        part *= 2
    return parts
