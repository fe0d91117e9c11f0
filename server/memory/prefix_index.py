"""The prefix cache: full blocks by the content of their whole prefix, shared by those who know it.

Knows keys, pages and how often they were of use; not which sequence has which block.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from server.memory.idle_heap import IdleHeap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from server.memory.page_pool import PagePool


class BlockKeys:
    """The keys of one sequence's full blocks, each computed once.

    key[i] = sha256(key[i - 1] + the block's token ids as int32), and key[-1] = sha256(salt, digest
    of the adapter): so equal keys mean equal tokens from the first on, computed with the same
    weights, for the same tenant. A name is no part of it.
    """

    def __init__(self, cache_salt: str, digest: str | None) -> None:
        """digest: of the adapter's content, or of a combination; None = base model."""
        # What comes before the salt is "base", hex, or "mix:" and hex of fixed length.
        seed = f"{digest or 'base'}:{cache_salt}"
        self._keys: list[bytes] = []
        self._last = sha256(seed.encode()).digest()

    def of(self, token_ids: Sequence[int], block_size: int) -> Sequence[bytes]:
        """One key for each full block of the tokens, which may only grow from call to call."""
        for start in range(len(self._keys) * block_size, len(token_ids), block_size):
            if start + block_size > len(token_ids):
                break
            content = array("i", token_ids[start : start + block_size]).tobytes()
            self._last = sha256(self._last + content).digest()
            self._keys.append(self._last)
        return self._keys


@dataclass(slots=True, eq=False)
class Block:
    """A full block that others may share; changed only by PrefixIndex."""

    key: bytes
    page: int
    parent: Block | None  # the block before it
    digest: str | None  # of the adapter that computed it; None = base model
    num_users: int = 1  # sequences that have it in their tables
    num_hits: int = 0  # sequences that found it here instead of computing it
    num_children: int = 0  # blocks of the index that follow it
    priority: float = 0.0  # as of when its last user left; see Reclaimer


class PrefixIndex:
    """Published blocks: content → page. One without users is idle: kept until its page is needed.

    Invariants: with a block the index has those before it. Whoever uses a block uses those before
    it, so that what follows an idle block is idle. The heap has the idle blocks that nothing
    follows: evicting them one by one reaches every idle block, the end of a prefix first.
    """

    def __init__(self, pool: PagePool, page_seconds: float) -> None:
        """page_seconds: what it costs to compute the content of a page again."""
        self.pool = pool
        self.num_idle = 0
        self.num_evictions = 0
        self._page_seconds = page_seconds
        self._blocks: dict[bytes, Block] = {}
        self._of_adapter: dict[str, dict[Block, None]] = {}  # in the order of publication
        self._leaves: IdleHeap[Block] = IdleHeap()
        self._num_published = 0
        self._num_reused = 0  # of these, blocks that were hit at least once

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    @property
    def digests(self) -> set[str]:
        """Adapters of which there are blocks."""
        return set(self._of_adapter)

    def num_used(self, keys: Sequence[bytes]) -> int:
        """Leading blocks of a prefix that somebody uses: they can be shared without a page."""
        return bisect_left(keys, True, key=lambda key: not self._is_used(key))

    def share(self, keys: Sequence[bytes]) -> list[Block]:
        """One more user for the longest part of the prefix that is here; its blocks."""
        num_found = bisect_left(keys, True, key=lambda key: key not in self._blocks)
        blocks = [self._blocks[key] for key in keys[:num_found]]
        for block in blocks:
            self._hit(block)
        return blocks

    def publish(self, key: bytes, page: int, parent: Block | None, digest: str | None) -> Block:
        """Make a computed block known and return it; its page is the index's from now on.

        Where the same content is here already, that block gets one more user and is returned: the
        caller uses its page, and its own is freed.
        """
        if (known := self._blocks.get(key)) is not None:
            self._hit(known)
            self.pool.free([page])
            return known
        block = self._blocks[key] = Block(key, page, parent, digest)
        self._num_published += 1
        if parent is not None:
            parent.num_children += 1
        if digest is not None:
            self._of_adapter.setdefault(digest, {})[block] = None
        return block

    def release(self, blocks: Sequence[Block]) -> None:
        """One user less for each block of a prefix; those without users become idle."""
        for block in reversed(blocks):
            block.num_users -= 1
            if block.num_users == 0:
                self.num_idle += 1
                block.priority = self.pool.price + self._worth(block)
                self._offer(block)

    def least_idle(self) -> tuple[float, Block] | None:
        """The least valuable idle block that nothing follows, with its priority; None without."""
        return self._leaves.least()

    def evict(self, block: Block) -> None:
        """Free the page of an idle block that nothing follows."""
        assert block.num_users == block.num_children == 0, "a block in use, or one before others"
        self._leaves.discard(block)
        self.num_idle -= 1
        self.num_evictions += 1
        del self._blocks[block.key]
        if block.digest is not None:
            del self._of_adapter[block.digest][block]
            if not self._of_adapter[block.digest]:
                del self._of_adapter[block.digest]
        self.pool.free([block.page])
        if block.parent is not None:
            block.parent.num_children -= 1
            self._offer(block.parent)

    def evict_of(self, digest: str) -> None:
        """Free all blocks of an adapter, which has no users."""
        blocks = self._of_adapter.get(digest, ())
        leaves = [block for block in blocks if block.num_children == 0]
        for leaf in leaves:
            block: Block | None = leaf
            while block is not None and block.num_children == 0:
                self.evict(block)
                block = block.parent

    def check(self) -> None:
        """Recompute the invariants; AssertionError when one does not hold."""
        pages = [block.page for block in self]
        assert len(set(pages)) == len(pages), "two blocks of the index share a page"
        assert not any(self.pool.is_free(page) for page in pages), "the index has a free page"
        num_children: dict[bytes, int] = {}
        for block in self:
            parent = block.parent
            if parent is not None:
                assert self._blocks.get(parent.key) is parent, "a block without those before it"
                assert parent.num_users >= block.num_users, "a block in use behind an idle one"
                assert parent.digest == block.digest, "a prefix of two adapters"
                num_children[parent.key] = num_children.get(parent.key, 0) + 1
        for block in self:
            assert block.num_children == num_children.get(block.key, 0)
            is_leaf = block.num_users == block.num_children == 0
            assert (block in self._leaves) == is_leaf, "not exactly the idle leaves are in the heap"
        assert self.num_idle == sum(block.num_users == 0 for block in self)
        listed = {(digest, b) for digest, blocks in self._of_adapter.items() for b in blocks}
        assert listed == {(block.digest, block) for block in self if block.digest is not None}
        self._leaves.check()

    def _is_used(self, key: bytes) -> bool:
        block = self._blocks.get(key)
        return block is not None and block.num_users > 0

    def _hit(self, block: Block) -> None:
        if block.num_users == 0:
            self.num_idle -= 1
            self._leaves.discard(block)
        block.num_users += 1
        block.num_hits += 1
        self._num_reused += block.num_hits == 1

    def _offer(self, block: Block) -> None:
        if block.num_users == block.num_children == 0:
            self._leaves.put(block, block.priority)

    def _worth(self, block: Block) -> float:
        """Seconds that the block may be expected to save.

        Uses are expected as there were hits; and for a block of which nothing is known yet, as
        many as the share of all blocks so far that were hit at all. So where prompts never come
        again all blocks are worth nothing, and where they do a new one is given its chance.
        """
        num_uses = block.num_hits + self._num_reused / max(1, self._num_published)
        return num_uses * self._page_seconds
