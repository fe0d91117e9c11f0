"""What could never fit is refused with the arithmetic, before anything is loaded."""

from __future__ import annotations

import pytest

from server.memory.image_file import ImageError
from server.memory.image_sizes import ImageSizes
from server.memory.residency import AdapterImage, AdapterPart, combination


def mix(**num_rows: object) -> AdapterImage:
    """A combination of images of the given number of rows; see the loader's `measure`."""
    return combination(
        AdapterPart(AdapterImage(digest, str(rows)), 0.5) for digest, rows in num_rows.items()
    )


@pytest.fixture
def sizes(loader) -> ImageSizes:
    """4 slots of 30 rows, 10 pages of 4 rows."""
    return ImageSizes(loader, num_slots=4, num_pages=10, max_rows=30)


@pytest.mark.parametrize("image", [mix(a=16, b=8), mix(a=30), mix(a=10, b=10, c=10)])
def test_what_fits_exactly_is_no_misfit(sizes, image):
    assert sizes.misfit(image) is None


def test_a_combination_needs_a_slot_beside_its_members(sizes):
    error = sizes.misfit(mix(a=1, b=1, c=1, d=1))
    assert "4 adapters takes 5 slots" in error
    assert "there are 4" in error
    assert "max_adapters" in error


def test_the_members_rows_have_to_fit_one_slot(sizes):
    error = sizes.misfit(mix(a=20, b=8, c=3))
    assert "20 + 8 + 3 = 31 rank rows" in error
    assert "a slot has room for 30" in error
    assert "max_adapter_rank" in error


def test_the_members_pages_have_to_fit_the_pool(sizes):
    error = sizes.misfit(mix(a=17, b=9, c=9))
    assert "5 + 3 + 3 = 11 pages" in error
    assert "the pool has room for 10" in error
    assert "pool_bytes" in error


def test_an_adapter_by_itself_is_judged_by_its_size_alone(sizes):
    assert sizes.misfit(AdapterImage("a", "31")) is None
    with pytest.raises(ImageError, match="31 rank rows"):
        sizes.of(AdapterImage("a", "31"))


def test_a_member_that_could_not_be_by_itself_is_a_misfit(sizes):
    assert "broken header" in sizes.misfit(mix(a="broken", b=20))
    assert "31 rank rows" in sizes.misfit(mix(a=1, b=31))


def test_each_header_is_read_once(sizes, loader):
    for _ in range(3):
        sizes.misfit(mix(a=16, b=8))
        sizes.of(AdapterImage("a", "16"))
    assert loader.num_measured == 2
