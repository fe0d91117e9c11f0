"""Residency: what is loaded, what is evicted, what is never evicted, and that nothing waits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from server.memory.adapter_pool import AdapterPool
from server.memory.page_pool import PagePool
from server.memory.residency import AdapterImage, AdapterPart, combination


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


def mix_of(**weights: float) -> AdapterImage:
    return combination(AdapterPart(image_of(d), weight) for d, weight in weights.items())


def users(adapters) -> dict[str, int]:
    return {adapter.digest: adapter.num_users for adapter in adapters.report()}


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


def test_a_load_leaves_the_spare_pages_free(adapters, pool):
    assert not adapters.request(image_of("a", 8), num_spare=3)
    assert adapters.request(image_of("a", 8), num_spare=2)
    assert pool.num_free == 2


def test_a_header_is_read_once_while_a_load_waits_for_room(adapters, make_resident, loader):
    make_resident("pinned", 10)
    adapters.acquire("pinned")
    for _ in range(5):
        assert not adapters.request(image_of("new"))
    assert loader.num_measured == 2


def test_a_load_evicts_nothing_by_itself(adapters, make_resident):
    for digest in "abcd":
        make_resident(digest)
    assert not adapters.request(image_of("new"))
    assert len(states(adapters)) == 4


def test_only_idle_adapters_are_evicted(adapters, make_resident):
    make_resident("pinned", 2)
    adapters.acquire("pinned")
    adapters.acquire("pinned")
    adapters.release("pinned")
    adapters.request(image_of("loading", 2))
    assert adapters.num_idle_pages() == 0
    assert adapters.least_idle() is None
    for digest in ("pinned", "loading", "absent"):
        with pytest.raises(ValueError, match=f"adapter {digest} is not idle"):
            adapters.evict(digest)


def test_the_least_valuable_adapter_is_the_one_of_fewest_uses(adapters, make_resident):
    make_resident("often", num_uses=5)
    make_resident("rarely", num_uses=1)
    make_resident("recently", num_uses=2)
    assert adapters.least_idle()[1] == "rarely"
    assert adapters.least_idle(keep={"rarely"})[1] == "recently"
    assert adapters.least_idle(keep={"rarely", "recently", "often"}) is None
    adapters.acquire("rarely")
    assert adapters.least_idle()[1] == "recently"
    adapters.check()


def test_idle_pages_are_counted_without_those_to_keep(adapters, make_resident):
    make_resident("a", 1)
    make_resident("b", 2)
    make_resident("c", 4)
    adapters.acquire("c")
    assert adapters.num_idle_pages() == 3
    assert adapters.num_idle_pages(keep=["a", "a", "c", "absent"]) == 2


def test_an_evicted_slot_has_no_rows_and_no_digest(adapters, make_resident):
    make_resident("a")
    slot = adapters.acquire("a")
    adapters.release("a")
    adapters.evict("a")
    assert not adapters.rows.row_ptr[slot].any()
    for query in (adapters.digest_of, adapters.max_span_rows):
        with pytest.raises(KeyError, match=f"slot {slot} has no resident adapter"):
            query(slot)


def test_pages_of_an_evicted_adapter_are_loaded_anew_with_the_new_rows(
    adapters, make_resident, loader
):
    make_resident("a", 8)
    assert not adapters.request(image_of("b", 4))
    adapters.evict("a")
    assert not adapters.is_resident("a")
    assert adapters.num_evictions == 1
    assert adapters.request(image_of("b", 4))
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


def test_a_combination_has_its_members_rows_in_a_slot_of_its_own(adapters, make_resident, pool):
    for digest in ("a", "b"):
        make_resident(digest)
    mix = mix_of(a=0.5, b=-3.0)
    slot = adapters.combine(mix)
    adapters.check()
    assert adapters.digest_of(slot) == mix.digest
    rows = adapters.rows
    slots = [adapters.acquire(digest) for digest in ("a", "b")]
    offsets = [rows.row_offset[each, :4].tolist() for each in slots]
    assert rows.row_offset[slot, :8].tolist() == offsets[0] + offsets[1]
    # The images have scale 0.5.
    assert rows.row_scale[slot, :8].tolist() == [0.25] * 4 + [-1.5] * 4
    assert adapters.max_span_rows(slot) == 8
    assert pool.num_free == 8, "it takes no page"
    assert states(adapters).keys() == {"a", "b"}


def test_users_of_a_combination_share_its_slot_and_pin_its_members(adapters, make_resident):
    for digest in ("a", "b"):
        make_resident(digest)
    mix = mix_of(a=0.5, b=0.5)
    assert adapters.needs_slot(mix)
    slot = adapters.combine(mix)
    assert not adapters.needs_slot(mix)
    assert adapters.combine(mix) == slot
    assert users(adapters) == {"a": 2, "b": 2}
    assert adapters.least_idle() is None
    assert adapters.drop("a") is None
    adapters.release(mix.digest)
    adapters.check()
    assert adapters.digest_of(slot) == mix.digest
    adapters.release(mix.digest)
    adapters.check()
    assert users(adapters) == {"a": 0, "b": 0}
    assert not adapters.rows.row_ptr[slot].any()
    with pytest.raises(KeyError, match=f"slot {slot} has no resident adapter"):
        adapters.digest_of(slot)
    with pytest.raises(ValueError, match="has no users"):
        adapters.release(mix.digest)


def test_other_weights_are_another_slot(adapters, make_resident):
    for digest in ("a", "b"):
        make_resident(digest)
    slots = [adapters.combine(mix_of(a=w, b=1 - w)) for w in (0.25, 0.75)]
    assert len({*slots, adapters.acquire("a"), adapters.acquire("b")}) == 4
    adapters.check()


def test_without_a_member_or_a_slot_there_is_no_combination_and_nothing_is_pinned(
    adapters, make_resident
):
    make_resident("a")
    adapters.request(image_of("b"))
    assert adapters.combine(mix_of(a=0.5, b=0.5)) is None, "b is loading"
    for digest in ("c", "d"):
        make_resident(digest)
    assert adapters.combine(mix_of(a=0.5, c=0.5)) is None, "all four slots are taken"
    assert not any(users(adapters).values())
    adapters.check()


def test_uses_in_combinations_count_for_the_members(adapters, make_resident):
    make_resident("a")
    make_resident("b", num_uses=1)
    for _ in range(2):
        adapters.combine(mix_of(a=2.0))
        adapters.release(mix_of(a=2.0).digest)
    assert adapters.least_idle()[1] == "b"


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
