"""Promises of the packing: no row straddles, overlaps or is lost, and little is wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.image import build_image, plan_image
from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from adapters_store.packing import best_fill, check_layout, pack_rows, row_sizes
from adapters_store.reading import AdapterModule
from kernels.layout import ROW_ALIGNMENT, aligned

steady = settings(deadline=None, derandomize=True, max_examples=60)


def llama_layout(num_layers, hidden, kv, ffn, page_elements, dtype="bfloat16"):
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    shapes += [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    targets = tuple(
        TargetShape(name, *shape) for name, shape in zip(TARGET_PATHS, shapes, strict=True)
    )
    return BaseLayout("llama", num_layers, targets, page_elements, dtype)


SMOLLM2_135M = llama_layout(30, 576, 192, 1536, 30 * 2 * 8 * 3 * 64)
LLAMA_3_8B = llama_layout(32, 4096, 1024, 14336, 32 * 2 * 16 * 8 * 128)


@pytest.mark.parametrize("rank", range(8, 65))
@pytest.mark.parametrize("layout", [SMOLLM2_135M, LLAMA_3_8B], ids=["SmolLM2-135M", "Llama-3-8B"])
def test_wastes_under_three_percent_with_all_targets(layout, rank):
    ranks = {(layer, t.name): rank for layer in range(layout.num_layers) for t in layout.targets}
    packing = pack_rows(row_sizes(layout, ranks), layout.page_elements)
    assert packing.waste < 0.03


row_lists = st.lists(st.integers(1, 40).map(lambda n: n * ROW_ALIGNMENT), max_size=200)


@steady
@given(row_lists, st.integers(40, 200).map(lambda n: n * ROW_ALIGNMENT))
def test_rows_never_straddle_a_page_and_never_overlap(sizes, page_elements):
    packing = pack_rows(sizes, page_elements)
    taken = np.zeros(packing.num_pages * page_elements, bool)
    for offset, size in zip(packing.row_offset, sizes, strict=True):
        assert offset % ROW_ALIGNMENT == 0
        assert offset // page_elements == (offset + size - 1) // page_elements
        assert not taken[offset : offset + size].any()
        taken[offset : offset + size] = True
    assert np.isclose(packing.waste, 1 - taken.mean() if taken.size else 0)


@steady
@given(row_lists.filter(bool), st.integers(40, 200).map(lambda n: n * ROW_ALIGNMENT))
def test_every_page_has_rows_and_no_two_half_empty_pages_are_left(sizes, page_elements):
    packing = pack_rows(sizes, page_elements)
    used = np.zeros(packing.num_pages, int)
    np.add.at(used, np.array(packing.row_offset) // page_elements, sizes)
    assert used.min() > 0
    assert (used[:-1] * 2 >= page_elements - ROW_ALIGNMENT).all()


@steady
@given(
    st.integers(0, 300),
    st.dictionaries(st.integers(1, 30), st.integers(1, 6), min_size=1, max_size=4),
)
def test_best_fill_is_the_largest_sum_that_brute_force_finds(gap, available):
    sums = {0}
    for size, count in available.items():
        sums = {total + size * n for total in sums for n in range(count + 1)}
    chosen = best_fill(gap, available)
    assert all(count <= available[size] for size, count in chosen.items())
    filled = sum(size * count for size, count in chosen.items())
    assert filled == max(total for total in sums if total <= gap)


@steady
@given(data=st.data())
def test_every_number_of_any_adapter_is_recovered_from_its_image(data):
    size = st.integers(1, 60)
    layout = llama_layout(
        data.draw(st.integers(1, 3)), *data.draw(st.tuples(size, size, size)), 256, "float32"
    )
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    modules = []
    for layer in range(layout.num_layers):
        for target in layout.targets:
            rank = data.draw(st.integers(0, 9))
            if rank:
                a = random.standard_normal((rank, target.in_features), np.float32)
                b = random.standard_normal((target.out_features, rank), np.float32)
                scale = rank / 8
                module = AdapterModule(layer, target.name, rank, 1, scale, a, "F32", b, "F32")
                modules.append(module)
    image = build_image(layout, modules, plan_image(layout, modules))
    flat = image.pages.reshape(-1)
    num_written = 0
    for module in modules:
        t = list(TARGET_PATHS).index(module.target)
        first, last = image.row_ptr[module.layer * 7 + t :][:2]
        assert last - first == module.rank
        for i, row in enumerate(range(first, last)):
            start = image.row_offset[row]
            b_start = start + aligned(module.a.shape[1])
            np.testing.assert_array_equal(flat[start:][: module.a.shape[1]], module.a[i])
            np.testing.assert_array_equal(flat[b_start:][: module.b.shape[0]], module.b[:, i])
            assert image.row_scale[row] == np.float32(module.scaling)
            num_written += module.a.shape[1] + module.b.shape[0]
    assert np.count_nonzero(flat) == num_written
    assert image.row_ptr[-1] == len(image.row_offset)


def test_refuses_a_page_that_is_smaller_than_a_row():
    with pytest.raises(ValueError, match="raise block_size"):
        check_layout(llama_layout(1, 64, 64, 64, 120))
    with pytest.raises(ValueError, match="exceeds a page"):
        pack_rows([16], 8)


def test_refuses_a_page_that_breaks_the_alignment():
    with pytest.raises(ValueError, match="multiple of 8"):
        check_layout(llama_layout(1, 8, 8, 8, 1001))
