"""Memory is divided as the server divides it, into its own pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.checking import check_adapter
from adapters_store.shipped import shipped_adapters
from server.engine.spec import GPU_POOL_SHARE
from server.roofline.capacity import POOL_SHARE, AdapterSize, Capacity, adapter_size, capacity
from server.roofline.hardware import GPUS
from server.roofline.shapes import find_shape


def test_the_pool_takes_the_share_that_the_server_takes():
    assert POOL_SHARE == GPU_POOL_SHARE


def test_a_real_adapter_takes_the_bytes_and_pages_that_the_store_packs_it_into():
    """A shipped adapter of rank 8 on all seven projections, packed for the planned layout."""
    shape = find_shape("SmolLM2-135M")
    report = check_adapter(shipped_adapters()["shout"], shape.layout(), max_rank=8)
    assert report.accepted
    assert {module.rank for module in report.modules} == {8}
    planned = adapter_size(shape, 8)
    page_bytes = 2 * shape.page_geometry().page_elements
    assert planned.num_pages == report.num_pages
    assert planned.num_pages * page_bytes == report.device_bytes
    waste = 1 - planned.row_bytes / report.device_bytes
    assert waste == pytest.approx(report.page_waste)


@pytest.mark.parametrize(
    ("name", "rank", "row_bytes"),
    [
        ("SmolLM2-135M", 1, 610_560),
        ("Llama-3-8B", 1, 5_242_880),
        ("Llama-3-8B", 16, 80 << 20),
        ("Qwen2.5-7B", 1, 5_046_272),
    ],
)
def test_adapters_have_the_bytes_that_the_operations_paper_names(name, rank, row_bytes):
    assert adapter_size(find_shape(name), rank).row_bytes == row_bytes


def test_memory_is_weights_reserve_and_pool(tiny, machine):
    """19 616 parameters; 0.9 of the other 960 768 bytes in pages of 4 tokens of 128 bytes."""
    plan = capacity(tiny, machine, 3, 17, (4,), 2)
    assert (plan.weight_bytes, plan.block_size, plan.page_bytes) == (39_232, 4, 512)
    assert (plan.num_pages, plan.pool_bytes, plan.reserve_bytes) == (1688, 864_256, 96_512)
    assert plan.weight_bytes + plan.reserve_bytes + plan.pool_bytes == 10**6
    assert (plan.blocks_per_seq, plan.kv_pages) == (5, 15)
    # 4 rows of 64, 48, 48, 64, 80, 80 and 80 elements in 2 layers: 7424 bytes.
    assert plan.sizes == (AdapterSize(4, 7424, 15),)
    assert plan.adapter_pages == 30
    assert plan.fits


def plan_of(num_pages, num_seqs, sizes, adapter_pages):
    adapters = tuple(AdapterSize(rank, 0, pages) for rank, pages in enumerate(sizes, 1))
    return Capacity(10**6, 0, 16, 100, num_pages, num_seqs, 1, adapters, adapter_pages)


@given(st.integers(0, 300), st.integers(0, 50), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_adapters_that_fit_are_those_that_fit_one_after_another(num_pages, num_seqs, sizes):
    plan = plan_of(num_pages, num_seqs, sizes, 0)
    count, room = 0, num_pages - num_seqs
    while room >= sizes[count % len(sizes)]:
        room -= sizes[count % len(sizes)]
        count += 1
    assert plan.adapters_that_fit == count


@given(st.integers(1, 300), st.integers(1, 200), st.integers(0, 200))
def test_a_batch_fits_where_its_pages_do(num_pages, num_seqs, adapter_pages):
    plan = plan_of(num_pages, num_seqs, [1], adapter_pages)
    assert plan.fits == (num_seqs + adapter_pages <= num_pages)
    assert plan.kv_tokens_that_fit == 16 * max(0, num_pages - adapter_pages)


def test_mixed_ranks_take_the_pages_of_their_turns():
    shape, gpu = find_shape("Llama-3-8B"), GPUS["h100"]
    plan = capacity(shape, gpu, 8, 1024, (8, 64), 5)
    eight, sixty_four = (adapter_size(shape, rank).num_pages for rank in (8, 64))
    assert plan.adapter_pages == 3 * eight + 2 * sixty_four


def test_weights_beyond_the_memory_leave_no_page():
    plan = capacity(find_shape("Llama-3.1-70B"), GPUS["l4"], 1, 16, (8,), 1)
    assert (plan.num_pages, plan.reserve_bytes, plan.fits) == (0, 0, False)
    assert (plan.adapters_that_fit, plan.kv_tokens_that_fit) == (0, 0)


def test_a_model_whose_rows_exceed_its_pages_is_refused(tiny, machine):
    narrow = replace(tiny, num_layers=1, num_kv_heads=1, head_dim=2, intermediate_size=4000)
    with pytest.raises(ValueError, match="a rank row of tiny has up to"):
        capacity(narrow, machine, 1, 1, (1,), 1)
