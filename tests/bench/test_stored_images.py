"""Adapters written in a hurry are still adapters of their own, and the engine takes each."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bench import stored_images
from bench.record import engine_settings
from bench.stored_images import forget_cached, store_fleet
from server.engine.spec import engine_spec
from server.memory.image_file import ImageFile

RANKS = (8, 4, 4, 8, 4)


def tiny_spec(directory):
    options = argparse.Namespace(model=None, quick=True, device="cpu", dtype="auto")
    return engine_spec(engine_settings(options, directory))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny_spec(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fleet(spec, tmp_path_factory):
    return store_fleet(spec, RANKS, tmp_path_factory.mktemp("fleet"))


def test_the_engine_takes_every_image_by_its_own_digest(spec, fleet):
    assert len({image.digest for image in [*fleet.images, *fleet.templates]}) == 7
    for stored in fleet.stored:
        with ImageFile(stored.image, spec.layout) as file:
            assert file.size.num_pages == stored.num_pages
            file.read_table()


def test_adapters_have_the_rank_of_their_place_and_weigh_as_much(fleet):
    assert tuple(stored.rank for stored in fleet.stored) == RANKS
    pages = {stored.rank: stored.num_pages for stored in fleet.stored}
    assert pages[4] < pages[8]
    assert fleet.mean_pages == pytest.approx((2 * pages[8] + 3 * pages[4]) / 5)
    assert fleet.num_bytes == sum(Path(image.path).stat().st_size for image in fleet.images)


def test_adapters_of_a_rank_differ_in_the_signs_of_their_rows(fleet):
    one, other = (load_file(fleet.images[i].path) for i in (1, 2))
    assert torch.equal(one["pages"], other["pages"])
    assert torch.equal(one["row_scale"].abs(), other["row_scale"].abs())
    share = (one["row_scale"] != other["row_scale"]).float().mean()
    assert 0.3 < share < 0.7


def test_an_image_that_leaves_the_page_cache_stays_as_it_was(fleet):
    content = Path(fleet.images[0].path).read_bytes()
    forget_cached(fleet.images[0])
    assert Path(fleet.images[0].path).read_bytes() == content


def test_a_disk_without_room_is_refused_with_the_remedy(spec, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(stored_images.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"2 adapters take .* has 1,048,576: .*--adapters.*TMPDIR"):
        store_fleet(spec, (4, 4), tmp_path)
