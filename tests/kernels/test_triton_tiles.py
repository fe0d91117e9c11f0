"""The rules for tiles, and the table of measured ones that goes before them."""

from __future__ import annotations

import json
import re
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.triton import adapters, tuned
from kernels.triton.tiles import (
    MAX_SPLITS,
    MIN_SGMV_SEGMENT,
    Tile,
    Work,
    num_tiles,
    rule_tiling,
    tiling,
    whole_splits,
)

LLAMA_QKV = Work(
    num_tokens=32,
    num_segments=32,
    max_segment=1,
    max_span_rows=48,
    in_features=4096,
    out_start=(0, 4096, 5120, 6144),
    itemsize=2,
)


@st.composite
def works(draw):
    lengths = draw(st.lists(st.integers(1, 600), min_size=1, max_size=80))
    widths = draw(st.lists(st.sampled_from([8, 192, 576, 1024, 14336]), min_size=1, max_size=3))
    return Work(
        num_tokens=sum(lengths),
        num_segments=len(lengths),
        max_segment=max(lengths),
        max_span_rows=draw(st.integers(1, 3 * 128)),
        in_features=draw(st.sampled_from([20, 64, 576, 3584, 4096, 18944])),
        out_start=(0, *accumulate(widths)),
        itemsize=draw(st.sampled_from([2, 4])),
    )


@given(works())
def test_every_split_has_inputs_and_expand_can_sum_them(work):
    chosen = rule_tiling(work)
    rounds = -(-work.in_features // chosen.shrink.columns)
    rounds_of_split = -(-rounds // chosen.num_splits)
    assert (chosen.num_splits - 1) * rounds_of_split < rounds
    assert chosen.num_splits <= MAX_SPLITS[chosen.method]


@given(works())
def test_sgmv_is_chosen_exactly_when_a_segment_fills_a_tensor_core(work):
    chosen = rule_tiling(work)
    assert (chosen.method == "sgmv") == (work.max_segment >= MIN_SGMV_SEGMENT)
    if chosen.method == "sgmv":
        assert min(*chosen.shrink[:3], *chosen.expand[:3]) >= 16
    else:
        assert chosen.shrink.tokens == chosen.expand.tokens == 1


@given(st.lists(st.integers(1, 600), min_size=1, max_size=80), st.sampled_from([16, 32, 64]))
def test_tiles_are_enough_and_at_most_one_a_segment_is_idle(lengths, tile_tokens):
    needed = sum(-(-length // tile_tokens) for length in lengths)
    given_tiles = num_tiles(sum(lengths), len(lengths), tile_tokens)
    assert needed <= given_tiles <= needed + len(lengths)


def test_few_tokens_are_split_over_inputs_and_rows_and_many_over_neither():
    few, many = (rule_tiling(LLAMA_QKV._replace(num_tokens=n, num_segments=n)) for n in (1, 4096))
    assert (few.num_splits, few.row_programs) == (8, 12)
    assert (many.num_splits, many.row_programs) == (1, 1)


def test_a_bound_on_the_rows_that_is_too_high_starts_no_more_programs():
    """A captured graph is launched for the highest rank that may come, 128 here."""
    graph = rule_tiling(LLAMA_QKV._replace(max_span_rows=384))
    exact = rule_tiling(LLAMA_QKV)
    assert graph.num_splits == exact.num_splits == 8
    assert graph.row_programs == exact.row_programs == 8


@pytest.mark.parametrize(
    ("in_features", "columns", "splits", "expected"),
    [(4096, 512, 8, 8), (3584, 512, 8, 7), (2304, 512, 4, 3), (576, 512, 8, 2), (20, 32, 4, 1)],
)
def test_splits_that_would_be_empty_are_left_out(in_features, columns, splits, expected):
    assert whole_splits(in_features, columns, splits) == expected


SHRINK, EXPAND = Tile(1, 8, 1024, 4, 1), Tile(1, 16, 256, 2, 1)


@pytest.fixture
def write_points(tmp_path, monkeypatch):
    """Make {(tokens, rows): splits} the table of the device "Some GPU", for LLAMA_QKV."""
    monkeypatch.setattr(tuned, "DIRECTORY", tmp_path)
    adapters.choose_tiling.cache_clear()

    def write(points):
        found = {key: tuned.TunedTiles(SHRINK, EXPAND, splits) for key, splits in points.items()}
        path = tuned.table_path("Some GPU")
        tuned.write_table(path, {"device": "Some GPU"}, {tuned.shape_of(LLAMA_QKV): found})
        return path

    yield write
    adapters.choose_tiling.cache_clear()


def test_a_measured_tiling_goes_before_the_rules_on_its_device_only(write_points):
    write_points({(32, 48): 4})
    chosen = adapters.choose_tiling(LLAMA_QKV, "Some GPU")
    assert chosen == tiling(LLAMA_QKV, SHRINK, EXPAND, 4)
    assert adapters.choose_tiling(LLAMA_QKV, "Another GPU") == rule_tiling(LLAMA_QKV)


@pytest.mark.parametrize(
    ("num_tokens", "max_span_rows", "num_splits"),
    [(32, 48, 2), (20, 48, 2), (8, 48, 1), (900, 48, 2), (32, 96, 4), (20, 60, 4), (32, 999, 4)],
)
def test_the_nearest_measured_work_that_is_no_smaller_counts(
    write_points, num_tokens, max_span_rows, num_splits
):
    write_points({(8, 48): 1, (32, 48): 2, (32, 96): 4})
    work = LLAMA_QKV._replace(num_tokens=num_tokens, max_span_rows=max_span_rows)
    assert adapters.choose_tiling(work, "Some GPU").num_splits == num_splits


def test_shapes_and_types_that_were_not_measured_are_left_to_the_rules(write_points):
    write_points({(32, 48): 4})
    for work in (
        LLAMA_QKV._replace(in_features=3584),
        LLAMA_QKV._replace(out_start=(0, 4096)),
        LLAMA_QKV._replace(itemsize=4),
        LLAMA_QKV._replace(num_tokens=99, max_segment=99),
    ):
        assert adapters.choose_tiling(work, "Some GPU") == rule_tiling(work)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda table: table.pop("tilings"),
        lambda table: table["tilings"][0].pop("shrink"),
        lambda table: table["tilings"][0]["expand"].update(colour=1),
        lambda table: table["tilings"][0].update(num_splits=9),
    ],
    ids=["no_tilings", "no_tile", "unknown_entry", "too_many_splits"],
)
def test_a_file_that_is_no_table_is_refused_with_the_remedy(write_points, break_it):
    path = write_points({(32, 48): 4})
    table = json.loads(path.read_text())
    break_it(table)
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=re.escape(f"{path} is no table") + ".*make tune-gpu"):
        adapters.choose_tiling(LLAMA_QKV, "Some GPU")


def test_a_devices_table_has_a_plain_file_name():
    assert tuned.table_path("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
