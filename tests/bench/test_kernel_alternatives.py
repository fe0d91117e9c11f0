"""Every way computes the same, cases are those that were asked for, and a wrong way is noticed."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench.adapter_step import make_step
from bench.kernel_alternatives import MAX_STACK_BYTES, bar, bar_options, cases, check, main, ways
from kernels import reference


@pytest.mark.parametrize("ranks", [(8,), (4, 4, 4), (1, 6, 17, 8, 64)])
@pytest.mark.parametrize("num_tokens", [5, 12])
def test_every_way_gives_what_dense_products_give(ranks, num_tokens):
    step = make_step(num_tokens, ranks, 48, 80, num_layers=2)
    calls = ways(step, "cpu")
    assert list(calls) == ["ours", "loop", "gather", "padded", "merged"]
    check(step, calls)


def test_the_packed_form_is_the_reference_kernels_too():
    step = make_step(7, (3, 8, 5), 24, 40, num_layers=2, dtype=torch.float32)
    out = step.x @ step.weight[1].T
    reference.add_adapters(out, step.x, step.storage, step.rows, step.index, step.span(1))
    torch.testing.assert_close(out, step.expected(1), atol=1e-4, rtol=1e-4)


def test_a_way_that_computes_something_else_is_not_timed():
    step = make_step(4, (8, 8), 32, 32)
    calls = ways(step, "cpu")
    swapped = make_step(4, (8, 8), 32, 32, seed=1)
    calls["loop"] = ways(swapped, "cpu")["loop"]
    with pytest.raises(RuntimeError, match="loop is off by"):
        check(step, calls)


def test_merged_weights_are_left_out_where_they_would_not_fit():
    step = make_step(2, (8, 8), 32, 32, num_layers=2)
    assert step.weight.nbytes * 2 <= MAX_STACK_BYTES
    huge = step.weight.new_empty(MAX_STACK_BYTES // 2 + 1, 1, 1, device="meta")
    assert "merged" not in ways(_with_weight(step, huge), "cpu")


def _with_weight(step, weight):
    import dataclasses

    return dataclasses.replace(step, weight=weight)


def test_cases_are_one_root_and_all_of_the_tokens_in_each_rank_and_mixed():
    found = cases((1, 16), (8, 64))
    assert {(n, len(ranks)) for n, ranks in found} == {(1, 1), (16, 1), (16, 4), (16, 16)}
    assert (16, (8, 64, 8, 64)) in found
    assert len(found) == 2 + 2 + 3 + 3


def test_more_adapters_than_tokens_are_refused():
    with pytest.raises(ValueError, match="3 adapters for 2 tokens"):
        make_step(2, (8, 8, 8), 32, 32)


@pytest.mark.parametrize(("ours", "holds"), [(19.0, True), (25.0, False), (50.0, False)])
def test_the_bar_is_a_fifth_of_the_base_and_a_tenth_of_gather(ours, holds, capsys):
    micros = {"base": 118.0, "ours": ours, "loop": 1e4, "gather": 261.0, "padded": 300.0}
    row = {"microseconds": {way: {"median": value} for way, value in micros.items()}}
    assert bar(row, 8)["holds"] is holds
    assert "at most 20%" in capsys.readouterr().out


def test_the_script_runs_at_its_smallest_size(tmp_path, monkeypatch, capsys):
    output = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--device", "cpu", "--output", str(output)])
    main()
    record = json.loads(output.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == output.read_text().strip()
    assert [row["num_tokens"] for row in record["rows"]] == [1, 4, 4, 4]
    assert all(row["microseconds"]["ours"]["median"] > 0 for row in record["rows"])


def test_the_bars_case_has_its_own_shape_whatever_was_asked_for():
    options = argparse.Namespace(in_features=4096, out_features=1024, layers=8, repeats=50)
    case = bar_options(options, 1)
    assert (case.in_features, case.out_features, case.layers, case.repeats) == (576, 960, 1, 50)
    assert options.in_features == 4096
