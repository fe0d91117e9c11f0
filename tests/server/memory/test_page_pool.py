"""The page pool, against a list-based allocator; block sizes of real models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.layout import TargetShape
from server.memory.page_pool import OutOfPages, PageGeometry, PagePool, choose_block_size


def pool_of(num_pages: int) -> PagePool:
    return PagePool(num_pages, 8, torch.float32, "cpu")


def targets(hidden: int, intermediate: int, q: int, kv: int) -> list[TargetShape]:
    return [
        TargetShape("q_proj", hidden, q),
        TargetShape("k_proj", hidden, kv),
        TargetShape("v_proj", hidden, kv),
        TargetShape("o_proj", q, hidden),
        TargetShape("gate_proj", hidden, intermediate),
        TargetShape("up_proj", hidden, intermediate),
        TargetShape("down_proj", intermediate, hidden),
    ]


def test_storage_starts_as_zeros_of_the_stated_shape():
    pool = PagePool(3, 16, torch.bfloat16, "cpu")
    assert pool.storage.shape == (3, 16)
    assert pool.storage.dtype == torch.bfloat16
    assert not pool.storage.any()
    assert pool.page_bytes == 32


@pytest.mark.parametrize(("num_pages", "page_elements"), [(0, 8), (4, 0), (-1, 8)])
def test_refuses_a_pool_that_holds_nothing(num_pages, page_elements):
    with pytest.raises(ValueError, match="pool_bytes"):
        PagePool(num_pages, page_elements, torch.float32, "cpu")


def test_allocates_every_page_once_and_then_raises_naming_the_numbers():
    pool = pool_of(4)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    with pytest.raises(OutOfPages, match=r"1 pages asked for, 0 of 4 free"):
        pool.allocate(1)
    pool.check()


def test_takes_nothing_when_too_few_pages_are_free():
    pool = pool_of(4)
    pool.allocate(2)
    with pytest.raises(OutOfPages):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_double_free_is_caught_within_one_call_and_across_calls():
    pool = pool_of(4)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(ValueError, match="free already"):
        pool.free([pages[0]])
    (page,) = pool.allocate(1)
    with pytest.raises(ValueError, match="free already"):
        pool.free([page, page])
    pool.check()


@pytest.mark.parametrize("page", [-1, 4])
def test_refuses_to_free_a_page_of_no_pool(page):
    with pytest.raises(ValueError, match="not one of the pool's 4 pages"):
        pool_of(4).free([page])


def test_check_finds_a_page_that_is_listed_as_free_and_owned():
    pool = pool_of(4)
    pool._free.append(pool.allocate(1)[0])
    with pytest.raises(AssertionError):
        pool.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40))
def test_agrees_with_a_list_based_allocator(operations):
    pool, owned = pool_of(12), []
    for is_allocation, number in operations:
        num_owned = sum(map(len, owned))
        if is_allocation and number > 12 - num_owned:
            with pytest.raises(OutOfPages):
                pool.allocate(number)
        elif is_allocation:
            pages = pool.allocate(number)
            assert len(pages) == number
            assert not set(pages) & {page for part in owned for page in part}
            owned.append(pages)
        elif owned:
            pool.free(owned.pop(number % len(owned)))
        pool.check()
        assert pool.num_free == 12 - sum(map(len, owned))


def test_page_elements_are_those_of_a_block_over_all_layers():
    assert PageGeometry(30, 3, 64, 8).page_elements == 30 * 2 * 8 * 3 * 64


@pytest.mark.parametrize(
    ("num_layers", "num_kv_heads", "head_dim", "shape", "block_size"),
    [
        pytest.param(30, 3, 64, (576, 1536, 576, 192), 8, id="SmolLM2-135M"),
        pytest.param(32, 8, 128, (4096, 14336, 4096, 1024), 16, id="Llama-3-8B"),
    ],
)
def test_block_size_lets_a_rank_8_adapter_fill_its_pages(
    num_layers, num_kv_heads, head_dim, shape, block_size
):
    assert choose_block_size(num_layers, num_kv_heads, head_dim, targets(*shape)) == block_size


def test_block_size_never_makes_a_page_smaller_than_a_row():
    # A page of 4 or 8 tokens has 64 or 128 elements, the longest row 224.
    assert choose_block_size(1, 1, 8, targets(32, 192, 32, 8)) == 16


def test_a_page_that_was_set_aside_is_given_to_nobody():
    pool = pool_of(4)
    page = pool.set_aside()
    pool.check()
    assert (pool.num_pages, pool.num_free, len(pool.storage)) == (3, 3, 4)
    pages = pool.allocate(3)
    assert page not in pages
    with pytest.raises(OutOfPages):
        pool.allocate(1)
    with pytest.raises(ValueError, match="not one of the pool's 3 pages"):
        pool.free([page])
    pool.free(pages)
    pool.check()


def test_a_page_in_use_and_the_only_one_are_not_set_aside():
    pool = pool_of(2)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="page 1 of 2"):
        pool.set_aside()
    pool.free(pages)
    pool.set_aside()
    with pytest.raises(ValueError, match="pool_bytes"):
        pool.set_aside()
    pool.check()


def test_a_split_pool_is_two_over_the_same_storage_without_a_page_in_common():
    first, rest = pool_of(5).split(2)
    assert first.storage is rest.storage
    assert (first.num_pages, rest.num_pages) == (2, 3)
    assert (first.allocate(2), rest.allocate(3)) == ([0, 1], [2, 3, 4])
    for part, page in ((first, 2), (rest, 1)):
        with pytest.raises(ValueError, match="not one of the pool's"):
            part.free([page])
        part.check()
    rest.free([3])
    assert (first.num_free, rest.num_free) == (0, 1)


def test_each_part_of_a_split_pool_sets_its_own_last_page_aside():
    first, rest = pool_of(5).split(2)
    assert (first.set_aside(), rest.set_aside()) == (1, 4)
    assert (first.num_pages, rest.num_pages) == (1, 2)
    for part in (first, rest):
        part.check()


@pytest.mark.parametrize("num_pages", [0, 4, -1])
def test_a_split_leaves_no_part_without_a_page(num_pages):
    with pytest.raises(ValueError, match=f"into {num_pages} and the rest"):
        pool_of(4).split(num_pages)


def test_a_pool_in_use_is_not_split():
    pool = pool_of(4)
    pool.allocate(1)
    with pytest.raises(ValueError, match="3 of them free"):
        pool.split(2)
