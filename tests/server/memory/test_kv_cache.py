"""Block tables: growth in whole blocks, pages of one's own or of a known prefix, nothing lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.memory.kv_cache import KVCache
from server.memory.page_pool import OutOfPages, PagePool
from server.memory.prefix_index import BlockKeys

TOKENS = list(range(20))


def cache_of(num_pages: int, block_size: int = 4) -> KVCache:
    return KVCache(PagePool(num_pages, 8, torch.float32, "cpu"), block_size)


def keys_of(tokens=TOKENS, salt: str = "", digest: str | None = None, block_size: int = 4):
    return BlockKeys(salt, digest).of(tokens, block_size)


def begin(cache: KVCache, seq_id: str, num_tokens: int, salt: str = "") -> int:
    """A sequence that takes what is cached and computes the rest; how much was cached."""
    keys = keys_of(TOKENS[:num_tokens], salt)
    num_cached = cache.share(seq_id, keys, num_tokens)
    cache.extend(seq_id, num_tokens)
    cache.publish(seq_id, keys, num_tokens, None)
    cache.check()
    return num_cached


def test_a_sequence_has_as_many_blocks_as_its_tokens_need():
    cache = cache_of(8)
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (12, 3)):
        cache.extend("a", num_tokens)
        assert len(cache.table("a")) == num_blocks
        cache.check()


def test_growing_keeps_the_blocks_that_are_there():
    cache = cache_of(8)
    cache.extend("a", 4)
    first = list(cache.table("a"))
    cache.extend("b", 4)
    cache.extend("a", 9)
    assert list(cache.table("a"))[:1] == first
    assert cache.num_pages == 4


def test_blocks_needed_counts_what_is_missing_and_changes_nothing():
    cache = cache_of(8)
    assert cache.blocks_needed("a", 9) == 3
    cache.extend("a", 5)
    assert cache.blocks_needed("a", 8) == 0
    assert cache.blocks_needed("a", 9) == 1
    assert cache.num_free == 6


def test_an_extension_that_does_not_fit_changes_nothing():
    cache = cache_of(3)
    cache.extend("a", 8)
    with pytest.raises(OutOfPages):
        cache.extend("a", 17)
    assert len(cache.table("a")) == 2
    cache.check()


def test_freed_blocks_can_be_had_again_and_a_second_free_is_ignored():
    cache = cache_of(2)
    cache.extend("a", 8)
    cache.free("a")
    cache.free("a")
    cache.extend("b", 8)
    cache.check()
    assert cache.num_free == 0


def test_refuses_a_block_without_tokens():
    with pytest.raises(ValueError, match="block_size is 0"):
        cache_of(2, block_size=0)


def test_check_finds_a_page_that_two_tables_share():
    cache = cache_of(4)
    cache.extend("a", 4)
    cache.extend("b", 4)
    cache._tables["b"].pages[:] = cache.table("a")
    with pytest.raises(AssertionError, match="share"):
        cache.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=30))
def test_tables_stay_exclusive_and_exact_whatever_is_done(operations):
    cache = cache_of(10)
    for seq_id, num_tokens in operations:
        if num_tokens == 0:
            cache.free(seq_id)
        elif cache.blocks_needed(seq_id, num_tokens) > cache.num_free:
            with pytest.raises(OutOfPages):
                cache.extend(seq_id, num_tokens)
        else:
            cache.extend(seq_id, num_tokens)
        cache.check()
    for seq_id in "abc":
        cache.free(seq_id)
    assert cache.num_free == 10


def test_a_sequence_begins_with_the_blocks_that_others_computed():
    cache = cache_of(10)
    assert begin(cache, "a", 18) == 0
    assert begin(cache, "b", 20) == 16
    assert cache.table("a")[:4] == cache.table("b")[:4]
    assert cache.table("a")[4] != cache.table("b")[4]
    assert cache.num_pages == 6


def test_the_last_token_is_always_left_to_compute():
    cache = cache_of(10)
    begin(cache, "a", 16)
    assert begin(cache, "b", 16) == 12
    assert begin(cache, "c", 17) == 16


def test_blocks_to_begin_counts_idle_ones_as_taken_and_those_in_use_as_shared():
    cache = cache_of(10)
    begin(cache, "a", 20)
    assert cache.blocks_to_begin(keys_of(), 20) == 1
    begin(cache, "b", 9)
    cache.free("a")
    assert cache.blocks_to_begin(keys_of(), 20) == 3
    assert cache.blocks_to_begin(keys_of(salt="other"), 20) == 5
    assert cache.num_free == 4, "asking changes nothing"
    cache.check()


def test_only_full_computed_blocks_are_published_as_they_fill():
    cache = cache_of(10)
    cache.extend("a", 11)
    keys = keys_of(TOKENS[:11])
    for num_computed, num_blocks in ((3, 0), (4, 1), (7, 1), (11, 2)):
        cache.publish("a", keys, num_computed, None)
        assert len(cache.prefixes) == num_blocks
        cache.check()


def test_shared_blocks_survive_the_end_of_one_of_their_users():
    cache = cache_of(10)
    begin(cache, "a", 16)
    begin(cache, "b", 17)
    cache.free("a")
    cache.check()
    assert cache.num_pages == 5
    cache.free("b")
    cache.check()
    assert (cache.num_pages, cache.num_cached_pages, cache.num_free) == (0, 4, 6)


def test_of_two_that_compute_the_same_at_once_one_takes_the_others_pages():
    cache = cache_of(10)
    for seq_id in "ab":
        cache.extend(seq_id, 10)
    for seq_id in "ab":
        cache.publish(seq_id, keys_of(TOKENS[:10]), 10, None)
        cache.check()
    assert cache.table("a")[:2] == cache.table("b")[:2]
    assert cache.num_free == 6


def test_nothing_is_shared_across_salts():
    cache = cache_of(20)
    begin(cache, "a", 20, salt="tenant")
    assert begin(cache, "b", 20) == 0
    assert begin(cache, "c", 20, salt="tenant") == 16


def test_without_a_prefix_cache_nothing_is_kept():
    cache = KVCache(PagePool(10, 8, torch.float32, "cpu"), 4, prefix_cache=False)
    begin(cache, "a", 20)
    assert begin(cache, "b", 20) == 0
    for seq_id in "ab":
        cache.free(seq_id)
    assert cache.num_free == 10


def test_check_finds_a_block_with_a_wrong_number_of_users():
    cache = cache_of(10)
    begin(cache, "a", 8)
    cache.prefixes.share(keys_of(TOKENS[:8]))
    with pytest.raises(AssertionError):
        cache.check()
