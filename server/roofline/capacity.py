"""What fits into memory: weights, and a pool of pages for the KV cache and the adapters.

Pages are the server's: its choice of block size, its packing of rank rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from adapters_store.packing import check_layout, pack_rows, row_sizes
from server.roofline.shapes import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.roofline.hardware import Hardware
    from server.roofline.shapes import ModelShape

POOL_SHARE = 0.9
"""Of the memory that weights leave; the server's own default on a GPU. The rest is the reserve:
activations, index tables, graphs, the driver."""


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """One adapter of this rank in every projection of every layer."""

    rank: int
    row_bytes: int  # of its rank rows
    num_pages: int  # that they take


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory of one device beside the demand of one batch. Pages, unless a name says bytes."""

    memory_bytes: int
    weight_bytes: int
    block_size: int  # tokens in a page
    page_bytes: int
    num_pages: int  # of the pool
    num_seqs: int
    blocks_per_seq: int
    sizes: tuple[AdapterSize, ...]  # one for each given rank, in the order in which they are cycled
    adapter_pages: int  # of the batch's adapters

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def reserve_bytes(self) -> int:
        """What is left beside weights and pool; 0 where the weights do not fit."""
        return max(0, self.memory_bytes - self.weight_bytes - self.pool_bytes)

    @property
    def kv_pages(self) -> int:
        """Of the batch at its full context."""
        return self.num_seqs * self.blocks_per_seq

    @property
    def fits(self) -> bool:
        return self.kv_pages + self.adapter_pages <= self.num_pages and self.num_pages > 0

    @property
    def adapters_that_fit(self) -> int:
        """Resident adapters beside the batch's KV cache, their ranks in turn."""
        room = self.num_pages - self.kv_pages
        a_round = sum(size.num_pages for size in self.sizes)
        if room < 0:
            return 0
        count, room = room // a_round * len(self.sizes), room % a_round
        for size in cycle(self.sizes):  # ends within a round, which does not fit
            if size.num_pages > room:
                break
            count, room = count + 1, room - size.num_pages
        return count

    @property
    def kv_tokens_that_fit(self) -> int:
        """Tokens of KV cache beside the batch's adapters."""
        return max(0, self.num_pages - self.adapter_pages) * self.block_size


def capacity(
    shape: ModelShape,
    hardware: Hardware,
    num_seqs: int,
    context: int,
    ranks: Sequence[int],
    num_adapters: int,
) -> Capacity:
    """The memory plan of `num_seqs` sequences of `context` tokens with `num_adapters` adapters.

    Adapters have the given ranks in turn. Raises ValueError where the model's rank rows exceed its
    pages.
    """
    geometry = shape.page_geometry()
    page_bytes = geometry.page_elements * ITEM_BYTES
    weight_bytes = shape.num_parameters * ITEM_BYTES
    pool_bytes = int(POOL_SHARE * max(0, hardware.memory_bytes - weight_bytes))
    by_rank = {rank: adapter_size(shape, rank) for rank in dict.fromkeys(ranks)}
    sizes = tuple(by_rank[rank] for rank in ranks)
    num_rounds, rest = divmod(num_adapters, len(sizes))
    return Capacity(
        memory_bytes=hardware.memory_bytes,
        weight_bytes=weight_bytes,
        block_size=geometry.block_size,
        page_bytes=page_bytes,
        num_pages=pool_bytes // page_bytes,
        num_seqs=num_seqs,
        blocks_per_seq=-(-context // geometry.block_size),
        sizes=sizes,
        adapter_pages=num_rounds * sum(size.num_pages for size in sizes)
        + sum(size.num_pages for size in sizes[:rest]),
    )


def adapter_size(shape: ModelShape, rank: int) -> AdapterSize:
    """Rows and pages of an adapter on all projections, packed as the store packs it."""
    layout = shape.layout()
    check_layout(layout)
    ranks = {(n, target.name): rank for n in range(layout.num_layers) for target in layout.targets}
    sizes = row_sizes(layout, ranks)
    num_pages = pack_rows(sizes, layout.page_elements).num_pages
    return AdapterSize(rank, sum(sizes) * ITEM_BYTES, num_pages)
