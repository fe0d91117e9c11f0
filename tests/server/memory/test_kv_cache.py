"""Block tables: growth in whole blocks, exclusive pages, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.memory.kv_cache import KVCache
from server.memory.page_pool import OutOfPages, PagePool


def cache_of(num_pages: int, block_size: int = 4) -> KVCache:
    return KVCache(PagePool(num_pages, 8, torch.float32, "cpu"), block_size)


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
    cache._tables["b"] = list(cache.table("a"))
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
