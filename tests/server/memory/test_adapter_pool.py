"""Residency: what is loaded, what is evicted, what is never evicted, and that nothing waits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from server.memory.adapter_pool import AdapterPool
from server.memory.page_pool import PagePool
from server.memory.residency import AdapterImage


def image_of(digest: str, num_pages: int = 1) -> AdapterImage:
    return AdapterImage(digest=digest, path=str(4 * num_pages))


@pytest.fixture
def adapters(pool, layout, loader):
    return AdapterPool(pool, 4, 64, layout, loader=loader)


@pytest.fixture
def make_resident(adapters, loader):
    def make(digest: str, num_pages: int = 1, num_uses: int = 0) -> None:
        assert adapters.request(image_of(digest, num_pages))
        loader.finish(digest)
        assert adapters.poll() == [(digest, None)]
        for _ in range(num_uses):
            adapters.acquire(digest)
            adapters.release(digest)
        adapters.check()

    return make


def states(adapters) -> dict[str, str]:
    return {adapter.digest: adapter.state for adapter in adapters.report()}


def test_a_load_takes_pages_at_once_and_is_resident_only_after_poll(adapters, loader, pool):
    assert adapters.request(image_of("a", 3))
    assert pool.num_free == 7
    assert adapters.num_loading == 1
    loader.finish("a")
    assert not adapters.is_resident("a")
    assert adapters.acquire("a") is None
    adapters.check()
    assert adapters.poll() == [("a", None)]
    assert adapters.is_resident("a")
    assert adapters.num_loading == 0
    assert adapters.num_loads == 1
    adapters.check()


def test_requests_for_one_adapter_share_one_load(adapters, loader):
    for _ in range(3):
        assert adapters.request(image_of("a"))
    loader.finish("a")
    adapters.poll()
    assert adapters.request(image_of("a"))
    assert adapters.num_loads == 1
    assert not loader.pending


def test_rows_point_into_the_pages_that_were_allocated(adapters, loader, pool):
    held = pool.allocate(2)
    adapters.request(image_of("a", 2))
    pages = loader.finish("a")
    adapters.poll()
    slot = adapters.acquire("a")
    offsets = adapters.rows.row_offset[slot, :8]
    assert offsets.tolist() == [64 * page + 16 * i for page in pages for i in range(4)]
    assert not set(pages) & set(held)
    assert adapters.digest_of(slot) == "a"


def test_max_span_rows_is_the_largest_span_of_any_layer(adapters, loader):
    adapters.request(image_of("a", 8))
    # q k v o gate up down; layer 0: 3+4+2 = 9, 5, 1+1 = 2, 0; layer 1: 0, 0, 6+4 = 10, 6.
    ranks = (3, 4, 2, 5, 1, 1, 0), (0, 0, 0, 0, 6, 4, 6)
    row_ptr = torch.tensor([0, *ranks[0], *ranks[1]]).cumsum(0).to(torch.int32)
    loader.finish("a", row_ptr)
    adapters.poll()
    assert adapters.max_span_rows(adapters.acquire("a")) == 10


def test_a_failed_load_gives_everything_back_and_says_why(adapters, loader, pool):
    adapters.request(image_of("a", 3))
    loader.fail("a")
    assert adapters.poll() == [("a", "adapter a: the copy failed")]
    assert pool.num_free == 10
    assert states(adapters) == {}
    adapters.check()
    assert adapters.request(image_of("a", 3)), "it may be tried again"


def test_a_broken_header_is_reported_by_poll_and_takes_nothing(adapters, pool):
    assert adapters.request(AdapterImage(digest="a", path="broken"))
    assert pool.num_free == 10
    assert adapters.poll() == [("a", "adapter a: broken header")]
    assert adapters.poll() == []


def test_an_adapter_larger_than_the_pool_fails_with_the_numbers(adapters):
    adapters.request(image_of("a", 11))
    ((_, error),) = adapters.poll()
    assert "takes 11 pages" in error
    assert "pool has 10" in error
    assert "pool_bytes" in error


def test_an_adapter_with_more_rows_than_a_slot_holds_fails_with_the_numbers(pool, layout, loader):
    adapters = AdapterPool(pool, 2, 7, layout, loader=loader)
    adapters.request(image_of("a", 2))
    ((_, error),) = adapters.poll()
    assert "8 rank rows" in error
    assert "room for 7" in error


def test_evicts_the_least_valuable_unpinned_adapter(adapters, make_resident):
    make_resident("often", num_uses=5)
    make_resident("rarely", num_uses=1)
    make_resident("in-use")
    make_resident("recently", num_uses=2)
    adapters.acquire("in-use")
    assert adapters.request(image_of("new"))
    assert states(adapters).keys() == {"often", "in-use", "recently", "new"}
    assert adapters.num_evictions == 1
    adapters.check()


def test_of_two_equally_used_adapters_the_larger_goes_first(adapters, make_resident):
    make_resident("small", 1)
    make_resident("large", 6)
    assert adapters.evict_idle(1) == 6
    assert states(adapters).keys() == {"small"}


def test_evicts_nothing_when_that_would_not_make_enough_room(adapters, make_resident):
    make_resident("pinned", 6)
    make_resident("idle", 3)
    adapters.acquire("pinned")
    assert not adapters.request(image_of("new", 5))
    assert states(adapters).keys() == {"pinned", "idle"}
    adapters.release("pinned")
    assert adapters.request(image_of("new", 5))


def test_a_pinned_or_loading_adapter_is_never_evicted(adapters, make_resident):
    make_resident("pinned", 2)
    adapters.acquire("pinned")
    adapters.acquire("pinned")
    adapters.release("pinned")
    adapters.request(image_of("loading", 2))
    assert adapters.num_idle_pages() == 0
    assert adapters.evict_idle(10) == 0
    assert states(adapters) == {"pinned": "resident", "loading": "loading"}


def test_kept_adapters_are_spared(adapters, make_resident):
    for digest in "abcd":
        make_resident(digest)
    assert not adapters.request(image_of("new"), keep={"a", "b", "c", "d"})
    assert adapters.request(image_of("new"), keep={"a", "b", "d"})
    assert states(adapters).keys() == {"a", "b", "d", "new"}
    assert adapters.evict_idle(10, keep={"b"}) == 2
    assert adapters.is_resident("b")


def test_a_load_leaves_the_spare_pages_free(adapters, pool):
    assert not adapters.request(image_of("a", 8), num_spare=3)
    assert adapters.request(image_of("a", 8), num_spare=2)
    assert pool.num_free == 2


def test_a_load_that_may_not_evict_uses_only_what_is_free(adapters, make_resident):
    for digest in "abcd":
        make_resident(digest)
    assert not adapters.request(image_of("new"), may_evict=False)
    assert len(states(adapters)) == 4


def test_a_header_is_read_once_while_a_load_waits_for_room(adapters, make_resident, loader):
    make_resident("pinned", 10)
    adapters.acquire("pinned")
    for _ in range(5):
        assert not adapters.request(image_of("new"))
    assert loader.num_measured == 2


def test_an_evicted_slot_has_no_rows_and_no_digest(adapters, make_resident):
    make_resident("a")
    slot = adapters.acquire("a")
    adapters.release("a")
    adapters.evict_idle(1)
    assert not adapters.rows.row_ptr[slot].any()
    for query in (adapters.digest_of, adapters.max_span_rows):
        with pytest.raises(KeyError, match=f"slot {slot} has no resident adapter"):
            query(slot)


def test_pages_of_an_evicted_adapter_are_loaded_anew_with_the_new_rows(
    adapters, make_resident, loader
):
    make_resident("a", 8)
    adapters.request(image_of("b", 4))
    assert not adapters.is_resident("a")
    loader.finish("b")
    adapters.poll()
    adapters.check()
    assert int(adapters.rows.row_ptr[adapters.acquire("b"), -1]) == 16


@pytest.mark.parametrize("digest", ["absent", "idle"])
def test_a_release_without_an_acquire_is_refused(adapters, make_resident, digest):
    make_resident("idle")
    with pytest.raises(ValueError, match="has no users"):
        adapters.release(digest)


def test_drop_frees_idle_adapters_only(adapters, make_resident, loader, pool):
    make_resident("a", 3)
    assert adapters.acquire("a") is not None
    assert adapters.drop("a") is None
    adapters.release("a")
    assert adapters.drop("a") == 3 * pool.page_bytes
    assert adapters.drop("a") == 0
    adapters.request(image_of("b"))
    assert adapters.drop("b") is None
    loader.finish("b")
    adapters.poll()
    assert adapters.drop("b") == pool.page_bytes
    assert pool.num_free == 10
    assert adapters.num_evictions == 0


def test_the_report_counts_pages_users_and_uses(adapters, make_resident):
    make_resident("a", 2, num_uses=3)
    adapters.acquire("a")
    (report,) = adapters.report()
    assert (report.state, report.num_pages, report.num_users, report.num_uses) == (
        "resident",
        2,
        1,
        4,
    )
    assert adapters.num_pages == 2


def test_refuses_a_pool_whose_pages_are_not_those_of_the_layout(layout, loader):
    pool = PagePool(4, layout.page_elements, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="bfloat16"):
        AdapterPool(pool, 2, 8, layout, loader=loader)
    other = dataclasses.replace(layout, page_elements=8, dtype="bfloat16")
    with pytest.raises(ValueError, match="8 in bfloat16"):
        AdapterPool(pool, 2, 8, other, loader=loader)


def test_refuses_to_have_no_slot(pool, layout, loader):
    with pytest.raises(ValueError, match="max_adapters"):
        AdapterPool(pool, 0, 8, layout, loader=loader)


def test_check_finds_rows_outside_the_adapters_pages(adapters, make_resident):
    make_resident("a")
    adapters.rows.row_offset[adapters.acquire("a"), 0] = 64 * 9
    with pytest.raises(AssertionError, match="not its own"):
        adapters.check()
