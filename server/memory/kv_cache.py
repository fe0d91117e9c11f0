"""Block tables: which pages hold the keys and values of each sequence.

Knows tokens as numbers only. Callers ask by sequence and never free a page themselves, so that
blocks shared by several sequences can be counted here.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.memory.page_pool import PagePool


class KVCache:
    """The blocks of every sequence that has computed tokens; a block is one page of the pool.

    Invariant: a sequence has exactly as many blocks as its tokens need, and each page of a table
    is owned by it alone.
    """

    def __init__(self, pool: PagePool, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}: a block holds at least 1 token")
        self.block_size = block_size
        self._pool = pool
        self._tables: dict[str, array[int]] = {}  # int32: a step copies them as they are
        self._num_tokens: dict[str, int] = {}

    @property
    def num_pages(self) -> int:
        """Pages that tables hold."""
        return sum(len(table) for table in self._tables.values())

    @property
    def num_free(self) -> int:
        """Pages that a table could have at once."""
        return self._pool.num_free

    @property
    def max_blocks(self) -> int:
        """Most blocks that one sequence could ever have: all pages of the pool."""
        return self._pool.num_pages

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // self.block_size)

    def blocks_needed(self, seq_id: str, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold `num_tokens` tokens in total."""
        return max(0, self.blocks_for(num_tokens) - len(self._tables.get(seq_id, ())))

    def extend(self, seq_id: str, num_tokens: int) -> None:
        """Give the sequence blocks for `num_tokens` tokens in total, its first ones included.

        Raises OutOfPages, and then changes nothing.
        """
        pages = self._pool.allocate(self.blocks_needed(seq_id, num_tokens))
        self._tables.setdefault(seq_id, array("i")).extend(pages)
        self._num_tokens[seq_id] = max(num_tokens, self._num_tokens.get(seq_id, 0))

    def table(self, seq_id: str) -> Sequence[int]:
        """Page of each block, in the order of the tokens; valid until the next extend or free."""
        return self._tables[seq_id]

    def free(self, seq_id: str) -> None:
        """Let go of the sequence's blocks; one that has none is ignored."""
        self._pool.free(self._tables.pop(seq_id, ()))
        self._num_tokens.pop(seq_id, None)

    def check(self) -> None:
        """Recompute the invariant; AssertionError when it does not hold."""
        pages = [page for table in self._tables.values() for page in table]
        assert len(set(pages)) == len(pages), "two block tables share a page"
        assert not any(self._pool.is_free(page) for page in pages), "a table holds a free page"
        assert self._tables.keys() == self._num_tokens.keys()
        for seq_id, table in self._tables.items():
            assert len(table) == self.blocks_for(self._num_tokens[seq_id]), seq_id
