"""The host tier: what stays, what goes, and that the budget holds."""

from __future__ import annotations

import logging

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.memory import host_images
from server.memory.host_images import HostImages
from server.memory.image_file import RankTable

PAGE_BYTES = 64
TABLE = RankTable(torch.zeros(1), torch.zeros(0), torch.zeros(0))


def filled(host: HostImages, digest: str, num_pages: int = 1) -> bool:
    """Read an image into it; whether there was room."""
    image = host.reserve(digest, TABLE, num_pages)
    host.check()
    if image is None:
        return False
    for i, page in enumerate(image.pages):
        page[:] = hash((digest, i)) % 256
    host.let_go(image, complete=True)
    host.check()
    return True


def used(host: HostImages, digest: str, num_uses: int = 1) -> None:
    for _ in range(num_uses):
        image = host.hold(digest)
        assert image is not None
        host.let_go(image, complete=True)
        host.check()


def held(host: HostImages) -> set[str]:
    return set(host.num_pages_by_digest())


def test_an_image_stays_with_its_content_and_needs_no_second_read():
    host = HostImages(4 * PAGE_BYTES, PAGE_BYTES)
    assert host.hold("a") is None
    assert filled(host, "a", 3)
    image = host.hold("a")
    assert image is not None
    assert [set(page) for page in image.pages] == [{hash(("a", i)) % 256} for i in range(3)]
    assert image.table is TABLE
    assert host.num_hits == 1
    assert host.num_pages_by_digest() == {"a": 3}


def test_an_image_that_was_not_read_whole_is_not_kept():
    host = HostImages(2 * PAGE_BYTES, PAGE_BYTES)
    image = host.reserve("a", TABLE, 2)
    assert image is not None
    assert held(host) == set(), "nobody finds it before it is complete"
    host.let_go(image, complete=False)
    host.check()
    assert host.hold("a") is None
    assert filled(host, "b", 2), "its pages came back"


def test_evicts_the_least_used_and_of_equally_used_ones_the_larger():
    host = HostImages(6 * PAGE_BYTES, PAGE_BYTES)
    for digest, num_pages in (("often", 2), ("large", 3), ("small", 1)):
        filled(host, digest, num_pages)
    used(host, "often", 3)
    filled(host, "new", 1)
    assert held(host) == {"often", "small", "new"}


def test_what_was_used_often_but_long_ago_goes_in_the_end():
    host = HostImages(3 * PAGE_BYTES, PAGE_BYTES)
    filled(host, "old")
    used(host, "old", 5)
    for i in range(30):
        filled(host, f"new-{i}")
        used(host, f"new-{i}")
        if "old" not in held(host):
            break
    assert "old" not in held(host), "every victim makes what is not used worth less"


def test_a_held_image_is_never_evicted_and_room_beside_it_is_all_or_nothing():
    host = HostImages(4 * PAGE_BYTES, PAGE_BYTES)
    filled(host, "held", 2)
    filled(host, "idle", 1)
    image = host.hold("held")
    assert not filled(host, "new", 3)
    assert held(host) == {"held", "idle"}, "nothing goes where that is not enough"
    assert filled(host, "new", 2)
    assert held(host) == {"held", "new"}
    host.let_go(image, complete=True)
    assert filled(host, "newer", 4)
    assert held(host) == {"newer"}


def test_what_is_larger_than_the_budget_is_refused():
    host = HostImages(4 * PAGE_BYTES - 1, PAGE_BYTES)
    assert host.max_pages == 3
    assert not filled(host, "a", 4)
    assert not filled(HostImages(0, PAGE_BYTES), "a", 1)


def test_a_discarded_image_gives_its_pages_back_unless_it_is_held():
    host = HostImages(2 * PAGE_BYTES, PAGE_BYTES)
    filled(host, "a", 2)
    image = host.hold("a")
    host.discard("a")
    assert held(host) == {"a"}
    host.let_go(image, complete=True)
    host.discard("a")
    host.discard("unknown")
    host.check()
    assert held(host) == set()
    assert filled(host, "b", 2)


def test_memory_is_taken_in_chunks_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(host_images, "CHUNK_BYTES", 4 * PAGE_BYTES)
    taken: list[int] = []

    def allocate(num_pages: int, page_bytes: int) -> np.ndarray:
        taken.append(num_pages * page_bytes)
        return np.empty((num_pages, page_bytes), np.uint8)

    host = HostImages(11 * PAGE_BYTES, PAGE_BYTES, allocate=allocate)
    assert (host.max_pages, taken) == (8, [])
    filled(host, "a", 3)
    assert len(taken) == 1
    for digest in "bcdefgh":
        filled(host, digest, 3)
    assert taken == [4 * PAGE_BYTES] * 2


def test_where_less_memory_can_be_had_it_goes_on_with_what_there_is(monkeypatch, caplog):
    monkeypatch.setattr(host_images, "CHUNK_BYTES", 2 * PAGE_BYTES)
    taken: list[int] = []

    def allocate(num_pages: int, page_bytes: int) -> np.ndarray:
        if taken:
            raise RuntimeError("no more")
        taken.append(num_pages)
        return np.empty((num_pages, page_bytes), np.uint8)

    host = HostImages(100 * PAGE_BYTES, PAGE_BYTES, allocate=allocate)
    with caplog.at_level(logging.WARNING):
        assert not filled(host, "large", 3)
    assert "no more than 2 host pages" in caplog.text
    assert filled(host, "a", 2)
    assert filled(host, "b", 1)
    assert held(host) == {"b"}


operation = st.one_of(
    st.tuples(st.just("reserve"), st.sampled_from("abcdefgh"), st.integers(0, 6)),
    st.tuples(st.just("hold"), st.sampled_from("abcdefgh"), st.just(0)),
    st.tuples(st.just("complete"), st.integers(0, 7), st.booleans()),
    st.tuples(st.just("discard"), st.sampled_from("abcdefgh"), st.just(0)),
)


@given(st.lists(operation, max_size=80), st.integers(0, 12))
def test_budget_and_contents_hold_whatever_loads_do(operations, max_pages):
    num_bytes = 0

    def allocate(num_pages: int, page_bytes: int) -> np.ndarray:
        nonlocal num_bytes
        num_bytes += num_pages * page_bytes
        return np.zeros((num_pages, page_bytes), np.uint8)

    host = HostImages(max_pages * PAGE_BYTES, PAGE_BYTES, allocate=allocate)
    in_use: dict[str, tuple[object, bool]] = {}
    marks: dict[str, int] = {}
    for i, (kind, name, value) in enumerate(operations):
        apply(host, in_use, marks, i % 256, kind, name, value)
        host.check()
        assert num_bytes <= max_pages * PAGE_BYTES
        for image, is_read in in_use.values():
            assert is_read or image.digest in held(host), "a held image was evicted"
            assert all((page == marks[image.digest]).all() for page in image.pages)


def apply(host, in_use, marks, mark, kind, name, value) -> None:
    """`in_use`: digest → the image that a load has, and whether it is being read."""
    if kind == "discard":
        host.discard(name)
    elif kind == "complete" and in_use:
        image, is_read = in_use.pop(sorted(in_use)[name % len(in_use)])
        host.let_go(image, complete=value or not is_read)
    elif kind in ("hold", "reserve") and name not in in_use:
        image = host.hold(name)
        if image is not None:
            in_use[name] = (image, False)
        elif kind == "reserve" and (image := host.reserve(name, TABLE, value)) is not None:
            marks[name] = mark
            for page in image.pages:
                page[:] = mark
            in_use[name] = (image, True)
