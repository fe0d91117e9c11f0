"""Adapters have the sizes that the store's packing gives them."""

from __future__ import annotations

import pytest

from bench.simulation.fleet import ATTENTION, LLAMA_7B, LLAMA_13B, Fleet
from bench.workloads import BASE
from server.roofline.capacity import adapter_size


def test_an_adapter_on_all_projections_has_the_pages_that_a_plan_gives_it(shape):
    fleet = Fleet(shape, [8, 32])
    for i, rank in enumerate((8, 32)):
        assert fleet.kind(fleet.image(i)).num_pages == adapter_size(shape, rank).num_pages
        assert fleet.kind(fleet.image(i)).rank == rank


def test_sloras_rank_64_adapter_has_128_mib_of_llama_7b():
    """64 rows of 4 projections of 2 · 4096 elements in 32 layers, 2 bytes each."""
    fleet = Fleet(LLAMA_7B, [64], ATTENTION)
    assert fleet.largest.num_bytes == 64 * 4 * 2 * 4096 * 32 * 2 == 128 << 20
    assert fleet.largest.num_pages == 16


def test_the_llamas_have_the_published_numbers_of_parameters():
    assert LLAMA_7B.num_parameters == 6_738_415_616
    assert LLAMA_13B.num_parameters == 13_015_864_320


def test_the_base_model_is_no_adapter(fleet):
    assert fleet.image(BASE) is None
    assert fleet.image(3).digest != fleet.image(4).digest
    assert len(fleet) == 12


def test_an_unknown_target_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"\['x_proj'\] are no targets.*q_proj"):
        Fleet(shape, [8], ["q_proj", "x_proj"])
