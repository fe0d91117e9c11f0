"""`manylora plan`: from flags to a table, and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server.cli import main
from server.config import Settings
from server.roofline.hardware import GPUS
from server.roofline.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[3]
CHECK = ("--gpu", "h100", "--model", "Llama-3-8B")


def status_of(*flags):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *flags])
    return ended.value.code


def told(capsys, *flags):
    assert status_of(*flags, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_that_fits_is_printed_and_ends_with_0(capsys):
    assert status_of(*CHECK, "--batch", "64", "--context", "1024", "--ranks", "16") == 0
    out = capsys.readouterr().out
    assert out.startswith("Llama-3-8B, 16 bits, on NVIDIA H100 SXM: 80 GB")
    assert "\nFits: " in out


def test_a_plan_that_does_not_fit_is_printed_and_ends_with_1(capsys):
    assert status_of("--gpu", "l4", "--model", "llama-3.1-70b") == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_batch_and_prefill_are_the_servers_limits_and_every_sequence_has_an_adapter(capsys):
    fields = Settings.model_fields
    assert told(capsys, *CHECK)["workload"] == {
        "batch": fields["max_num_seqs"].default,
        "context": 1024,
        "num_adapters": fields["max_num_seqs"].default,
        "ranks": [16],
        "prefill_tokens": fields["max_batched_tokens"].default,
    }


def test_every_flag_reaches_the_plan(capsys):
    plan = told(
        capsys, "--gpu", "cpu", "--memory", "8", "--bandwidth", "40", "--tflops", "0.5",
        "--cache", "32", "--model", "smollm2-135m", "--batch", "9", "--context", "96",
        "--adapters", "4", "--ranks", "8,16", "--prefill", "200",
    )  # fmt: skip
    assert plan["hardware"] == {
        "name": "cpu",
        "memory_bytes": 8 * 10**9,
        "bytes_per_second": 40e9,
        "flops_per_second": 0.5e12,
        "cache_bytes": 32 << 20,
    }
    assert plan["model"]["name"] == "SmolLM2-135M"
    assert plan["workload"] == {
        "batch": 9, "context": 96, "num_adapters": 4, "ranks": [8, 16], "prefill_tokens": 200,
    }  # fmt: skip


def test_a_directory_with_a_config_is_a_model(capsys, tiny_llama):
    plan = told(capsys, "--gpu", "l4", "--model", str(tiny_llama), "--context", "128")
    assert (plan["model"]["name"], plan["model"]["num_layers"]) == ("tiny-llama", 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpu", "h900", "--model", "qwen3-8b"), ["gpu 'h900'", *GPUS]),
        (("--gpu", "l4", "--model", "x"), ["model 'x'", *(s.name for s in SHAPES.values())]),
        ((*CHECK, "--adapters", "65"), ["--adapters is 65", "0 to 64"]),
        ((*CHECK, "--context", "9000"), ["--context is 9000", "1 to 8192"]),
        ((*CHECK, "--ranks", "8,x"), ["--ranks", "'8,x'", "8,16,64"]),
        ((*CHECK, "--ranks", ""), ["--ranks", "''", "8,16,64"]),
        ((*CHECK, "--bandwidth", "nan"), ["--bandwidth is nan", "positive"]),
        ((*CHECK, "--batch", "x"), ["--batch", "'x'"]),
        ((*CHECK, "--bat", "3"), ["--bat"]),
        (("--gpu", "l4"), ["--model"]),
        (("--model", "qwen3-8b"), ["--gpu"]),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_wrong_flags_end_with_2_and_are_named(capsys, flags, said):
    assert status_of(*flags) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert all(word in error for word in said)
    assert "Traceback" not in error


def test_the_help_names_what_is_known_and_the_paper_every_flag(capsys):
    assert status_of("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (*GPUS, *(shape.name for shape in SHAPES.values()), "docs/planning.md"):
        assert word in text
    flags = set(re.findall(r"(?<![\w-])--[a-z]+", text)) - {"--help"}
    paper = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert flags == set(re.findall(r"(?<![\w-])--[a-z]+", paper))


def test_the_help_of_the_command_names_it(capsys):
    main(["--help"])
    assert "manylora plan --gpu NAME --model NAME_OR_DIR" in capsys.readouterr().out
