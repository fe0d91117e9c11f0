"""The prefix cache: what may be shared, what is kept, and in which order it goes."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch

from server.memory.page_pool import PagePool
from server.memory.prefix_index import Block, BlockKeys, PrefixIndex

TOKENS = tuple(range(40, 60))


def keys_of(token_ids=TOKENS, salt: str = "", digest: str | None = None, block_size: int = 4):
    return list(BlockKeys(salt, digest).of(token_ids, block_size))


@pytest.fixture
def pool() -> PagePool:
    return PagePool(12, 8, torch.float32, "cpu")


@pytest.fixture
def index(pool) -> PrefixIndex:
    return PrefixIndex(pool, page_seconds=2.0)


@pytest.fixture
def publish(pool, index):
    """Publish a chain of blocks, as one sequence does that goes on to use them."""

    def publish(keys, digest: str | None = None) -> list[Block]:
        blocks: list[Block] = []
        for key in keys:
            (page,) = pool.allocate(1)
            blocks.append(index.publish(key, page, blocks[-1] if blocks else None, digest))
        index.check()
        return blocks

    return publish


def evict_all(index) -> list[Block]:
    evicted = []
    while (least := index.least_idle()) is not None:
        index.evict(least[1])
        evicted.append(least[1])
        index.check()
    return evicted


def test_a_key_is_the_hash_of_the_key_before_it_and_the_blocks_tokens():
    seed = hashlib.sha256(b"d1:tenant").digest()
    first = hashlib.sha256(seed + struct.pack("<4i", 5, 6, 7, 8)).digest()
    second = hashlib.sha256(first + struct.pack("<4i", 9, 10, 11, 12)).digest()
    assert keys_of(range(5, 15), "tenant", "d1") == [first, second]


def test_keys_are_those_of_full_blocks_and_grow_with_the_tokens():
    keys = BlockKeys("", None)
    assert list(keys.of([1, 2, 3], 4)) == []
    tokens = [1, 2, 3, 4, 5]
    assert len(keys.of(tokens, 4)) == 1
    tokens += [6, 7, 8]
    assert list(keys.of(tokens, 4)) == keys_of(tokens)


@pytest.mark.parametrize(
    ("salt", "digest"), [("other", None), ("", "d1"), ("d1", None), ("base", "d1"), ("other", "d1")]
)
def test_no_key_is_that_of_another_salt_or_adapter(salt, digest):
    assert not set(keys_of()) & set(keys_of(salt=salt, digest=digest))
    assert not set(keys_of(salt="base", digest=None)) & set(keys_of(salt="", digest="base:base"))


def test_a_key_depends_on_every_token_before_it():
    other = (TOKENS[0] + 1, *TOKENS[1:])
    assert not set(keys_of()) & set(keys_of(other))


def test_the_longest_known_prefix_is_shared(index, publish):
    keys = keys_of()
    blocks = publish(keys[:3])
    assert index.share(keys) == blocks
    fork = keys_of((*TOKENS[:8], 1, 2, 3, 4))
    assert index.share(fork) == blocks[:2]
    assert index.share(keys_of((1, *TOKENS[1:]))) == []
    assert [block.num_users for block in blocks] == [3, 3, 2]
    index.check()


def test_a_block_without_users_is_kept_and_found_again(index, publish, pool):
    blocks = publish(keys_of())
    index.release(blocks)
    assert (index.num_idle, pool.num_free) == (5, 7)
    assert index.share(keys_of()) == blocks
    assert index.num_idle == 0
    index.check()


def test_blocks_in_use_are_counted_apart_from_idle_ones(index, publish):
    keys = keys_of()
    blocks = publish(keys)
    assert index.num_used(keys) == 5
    index.share(keys[:2])
    index.release(blocks)
    assert index.num_used(keys) == 2
    assert index.num_used(keys_of(salt="other")) == 0


def test_content_that_is_known_already_gets_one_more_user_and_its_second_page_is_freed(
    index, publish, pool
):
    first = publish(keys_of()[:2])
    second = publish(keys_of()[:3])
    assert second[:2] == first
    assert [block.num_users for block in second] == [2, 2, 1]
    assert pool.num_free == 9


def test_a_prefix_is_evicted_from_its_end(index, publish, pool):
    blocks = publish(keys_of())
    index.release(blocks)
    assert evict_all(index) == blocks[::-1]
    assert pool.num_free == 12
    assert index.num_evictions == 5


def test_a_block_before_one_in_use_is_never_evicted(index, publish):
    keys = keys_of()
    blocks = publish(keys)
    index.share(keys[:3])
    index.release(blocks)
    assert evict_all(index) == [blocks[4], blocks[3]]
    with pytest.raises(AssertionError, match="in use"):
        index.evict(blocks[2])


def test_blocks_that_were_hit_outlive_those_that_never_were(index, publish):
    popular, once = publish(keys_of()[:2]), publish(keys_of(salt="once")[:2])
    index.share(keys_of()[:2])
    index.release(popular)
    index.release(popular)
    index.release(once)
    assert evict_all(index) == [*once[::-1], *popular[::-1]]


def test_where_no_block_was_ever_hit_a_block_is_worth_nothing(index, publish):
    index.release(publish(keys_of()))
    priority, _ = index.least_idle()
    assert priority == 0


def test_a_new_block_is_worth_what_blocks_were_worth_so_far(index, publish):
    keys = keys_of()
    index.release(publish(keys[:3]))
    index.release(index.share(keys[:1]))
    fresh = publish(keys_of(salt="new")[:1])
    index.release(fresh)
    assert fresh[0].priority == 2.0 * 1 / 4, "one of four blocks was hit"


def test_what_becomes_idle_later_is_worth_more_by_the_price_of_then(index, publish, pool):
    index.release(publish(keys_of()[:1]))
    index.share(keys_of()[:1])
    pool.price = 5.0
    blocks = publish(keys_of(salt="later")[:1])
    index.release(blocks)
    assert blocks[0].priority == 5.0 + 2.0 / 2


def test_all_blocks_of_an_adapter_go_with_it(index, publish, pool):
    a = publish(keys_of(digest="a"), "a")
    fork = publish(keys_of((*TOKENS[:8], 1, 2, 3, 4), digest="a"), "a")
    b = publish(keys_of(digest="b")[:2], "b")
    for blocks in (a, fork, b):
        index.release(blocks)
    assert index.digests == {"a", "b"}
    index.evict_of("a")
    index.evict_of("absent")
    index.check()
    assert index.digests == {"b"}
    assert pool.num_free == 10
    assert index.share(keys_of(digest="a")) == []


def test_check_finds_a_block_whose_prefix_is_gone(index, publish):
    blocks = publish(keys_of())
    del index._blocks[blocks[1].key]
    with pytest.raises(AssertionError, match="without those before it"):
        index.check()


def test_check_finds_an_idle_block_before_one_in_use(index, publish):
    blocks = publish(keys_of())
    index.release(blocks[:1])
    with pytest.raises(AssertionError, match="behind an idle one"):
        index.check()
