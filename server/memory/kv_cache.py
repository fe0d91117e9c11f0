"""Block tables: which pages hold the keys and values of each sequence, its own and shared ones.

Knows tokens as numbers only. Callers ask by sequence and never free a page themselves, so that
blocks shared by several sequences can be counted here.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.memory.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.memory.page_pool import PagePool
    from server.memory.prefix_index import Block


@dataclass(slots=True)
class _Table:
    """The blocks of one sequence: first those of the prefix index, then its own."""

    pages: array[int] = field(default_factory=lambda: array("i"))  # int32: a step copies them
    shared: list[Block] = field(default_factory=list)
    num_tokens: int = 0


class KVCache:
    """The blocks of every sequence that has computed tokens; a block is one page of the pool.

    A full block is published once it is computed: from then on the prefix index has its page, and
    every sequence that begins with the same tokens, computed with the same weights, may have it in
    its table. Nothing is ever written to it again, since new tokens come behind it.
    Invariants: a sequence has exactly as many blocks as its tokens need; those of the index come
    first, and each has as many users as there are tables with it; every other page is in one table.
    """

    def __init__(
        self,
        pool: PagePool,
        block_size: int,
        *,
        prefix_cache: bool = True,
        page_seconds: float = 1.0,
    ) -> None:
        """page_seconds: see PrefixIndex. Without `prefix_cache` nothing is published."""
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}: a block holds at least 1 token")
        self.block_size = block_size
        self.prefixes = PrefixIndex(pool, page_seconds)
        self._pool = pool
        self._has_prefix_cache = prefix_cache
        self._tables: dict[str, _Table] = {}

    @property
    def num_pages(self) -> int:
        """Pages that tables hold, a shared one counted once."""
        num_shared = len(self.prefixes) - self.prefixes.num_idle
        return num_shared + sum(len(t.pages) - len(t.shared) for t in self._tables.values())

    @property
    def num_cached_pages(self) -> int:
        """Pages of published blocks that no table has: of use later, or given up when needed."""
        return self.prefixes.num_idle

    @property
    def num_free(self) -> int:
        """Pages that a table could have at once, without evicting anything."""
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
        table = self._tables.get(seq_id)
        return max(0, self.blocks_for(num_tokens) - (len(table.pages) if table else 0))

    def blocks_to_begin(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """Pages that `num_tokens` tokens would take from what is free or idle, by `share`.

        All but the shared blocks that others use already: an idle one is used up, too.
        """
        return self.blocks_for(num_tokens) - self.prefixes.num_used(self._useful(keys, num_tokens))

    def share(self, seq_id: str, keys: Sequence[bytes], num_tokens: int) -> int:
        """Begin the table of a sequence of `num_tokens` tokens with the blocks known already.

        keys: see BlockKeys. Returns the number of tokens in these blocks; it is less than
        `num_tokens`, since the last token has to be computed for what follows it.
        """
        assert seq_id not in self._tables, "a sequence begins once"
        blocks = self.prefixes.share(self._useful(keys, num_tokens))
        num_cached = len(blocks) * self.block_size
        if blocks:
            pages = array("i", [block.page for block in blocks])
            self._tables[seq_id] = _Table(pages, blocks, num_cached)
        return num_cached

    def extend(self, seq_id: str, num_tokens: int) -> None:
        """Give the sequence blocks for `num_tokens` tokens in total, its first ones included.

        Raises OutOfPages, and then changes nothing.
        """
        pages = self._pool.allocate(self.blocks_needed(seq_id, num_tokens))
        table = self._tables.setdefault(seq_id, _Table())
        table.pages.extend(pages)
        table.num_tokens = max(num_tokens, table.num_tokens)

    def publish(
        self, seq_id: str, keys: Sequence[bytes], num_computed: int, digest: str | None
    ) -> None:
        """Let others share the blocks that the first `num_computed` tokens fill.

        digest: of the adapter that computed them. Where another sequence has published the same
        content before, this one's table gets that page, and its own becomes free.
        """
        if not self._has_prefix_cache:
            return
        table = self._tables[seq_id]
        for i in range(len(table.shared), num_computed // self.block_size):
            parent = table.shared[-1] if table.shared else None
            block = self.prefixes.publish(keys[i], table.pages[i], parent, digest)
            table.pages[i] = block.page
            table.shared.append(block)

    def table(self, seq_id: str) -> Sequence[int]:
        """Page of each block, in the order of the tokens; valid until the next change to it."""
        return self._tables[seq_id].pages

    def free(self, seq_id: str) -> None:
        """Let go of the sequence's blocks; one that has none is ignored."""
        table = self._tables.pop(seq_id, None)
        if table is not None:
            self._pool.free(table.pages[len(table.shared) :])
            self.prefixes.release(table.shared)

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        self.prefixes.check()
        num_users: Counter[Block] = Counter()
        own: list[int] = []
        for seq_id, table in self._tables.items():
            assert len(table.pages) == self.blocks_for(table.num_tokens), seq_id
            assert list(table.pages[: len(table.shared)]) == [b.page for b in table.shared], seq_id
            parents = [None, *table.shared[:-1]]
            assert all(b.parent is p for b, p in zip(table.shared, parents, strict=False)), seq_id
            num_users.update(table.shared)
            own.extend(table.pages[len(table.shared) :])
        assert {b: b.num_users for b in self.prefixes if b.num_users} == num_users
        published = {block.page for block in self.prefixes}
        assert len(set(own)) == len(own), "two block tables share a page that is not published"
        assert published.isdisjoint(own), "a published page is in a table as the sequence's own"
        assert not any(self._pool.is_free(page) for page in own), "a table holds a free page"

    def _useful(self, keys: Sequence[bytes], num_tokens: int) -> Sequence[bytes]:
        return keys[: (num_tokens - 1) // self.block_size]
