"""The quality bench: its figures from logits that are known, and all of it on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench.quality import MAX_TOP1_LOSS, bars, figures, main, read, spaced, table
from server.model.linear import can_serve_int8

NEEDS_INT8 = pytest.mark.skipif(
    not can_serve_int8("cpu"), reason="this processor does not multiply int8 and bfloat16"
)


def logits_of(*distributions):
    """Logits [n, vocab] whose softmax these are, off by a constant in each row."""
    return torch.tensor(distributions).log() + torch.arange(len(distributions))[:, None]


@pytest.fixture
def known():
    """Readings of two tokens, both 0, by three variants."""
    said = {
        "float32": logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]),
        "bfloat16": logits_of([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]),
        "int8": logits_of([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),
    }
    return read(said, torch.tensor([0, 0]))


def test_perplexity_is_the_inverse_of_the_geometric_mean_probability_of_the_true_tokens(known):
    found = figures(known)
    assert found["num_tokens"] == 2
    assert found["perplexity"] == pytest.approx({"float32": 2, "bfloat16": 8**0.5, "int8": 4})
    assert found["perplexity_ratio"] == pytest.approx(2**0.5)


def test_divergence_is_from_float32(known):
    one_token = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    found = figures(known)["kl_to_float32"]
    assert found == pytest.approx({"bfloat16": one_token / 2, "int8": one_token})
    assert known["float32"].divergence.abs().max() == 0


def test_agreement_is_the_share_of_tokens_with_the_same_favourite(known):
    assert figures(known)["top1_agreement"] == {
        "bfloat16_float32": 0.5, "int8_float32": 0.0, "int8_bfloat16": 0.5,
    }  # fmt: skip


def row(ratio, bf16, int8):
    agreement = {"bfloat16_float32": bf16, "int8_float32": 0.0, "int8_bfloat16": int8}
    return {"perplexity_ratio": ratio, "top1_agreement": agreement}


@pytest.mark.parametrize(
    ("rows", "rate", "holds"),
    [
        ([row(1.005, 0.98, 0.975), row(0.9, 0.5, 0.6)], 0.9, [True, True, True]),
        ([row(0.9, 0.98, 0.975), row(1.02, 0.5, 0.6)], 1.0, [False, True, True]),
        (
            [row(1.0, 0.98, 0.98), row(1.0, 0.98, 0.98 - 2 * MAX_TOP1_LOSS)],
            0.8,
            [True] + [False] * 2,
        ),
    ],
)
def test_a_bar_is_about_the_worst_row_and_the_worst_adapter(rows, rate, holds):
    behaviours = [
        {"min_rate": 0.9, "rate": {"int8": rate}},
        {"min_rate": 0.8, "rate": {"int8": 1.0}},
    ]
    assert [bar["holds"] for bar in bars(rows, behaviours)] == holds


def test_samples_are_taken_at_even_distances():
    assert spaced(range(10), 100) == range(10)
    assert list(spaced(range(10), 4)) == [0, 3, 6, 9]
    assert list(spaced(range(12), 4)) == [0, 3, 6, 9]


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--dtype", "float32"]])
def test_what_it_compares_cannot_be_chosen(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", *words])
    with pytest.raises(SystemExit):
        main()
    assert "leave --device and --dtype" in capsys.readouterr().err


@NEEDS_INT8
def test_the_script_runs_at_its_smallest_size(tmp_path, monkeypatch, capsys):
    output = tmp_path / "quality.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--output", str(output)])
    main()
    record = json.loads(output.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == output.read_text().strip()
    read_by = [(row["text"], row["adapter"]) for row in record["rows"]]
    assert read_by == [("papers", None), ("chat", None), ("chat", "json"), ("chat", "shout")]
    for found in record["rows"]:
        assert 0 < found["kl_to_float32"]["bfloat16"] < found["kl_to_float32"]["int8"] < 0.1
        assert found["perplexity_ratio"] == pytest.approx(1, abs=0.05)
    assert [found["adapter"] for found in record["behaviours"]] == ["json", "shout"]
    assert "bars" not in record  # they are about the model that is served
    assert table(record).count("\n") >= 6
