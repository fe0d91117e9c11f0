"""The command: its help and version, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from server.cli import main
from server.config import Settings


@pytest.fixture(autouse=True)
def own_environment(monkeypatch) -> None:
    """The caller's variables set nothing, and what the command sets is taken back."""
    for name in os.environ:
        if name.upper().startswith("MANYLORA_"):
            monkeypatch.delenv(name)
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def served(monkeypatch) -> list[Settings]:
    """What `serve` was called with; it ends with status 3."""
    calls: list[Settings] = []

    def serve(settings: Settings) -> int:
        calls.append(settings)
        return 3

    monkeypatch.setattr("server.serve.serve", serve)
    return calls


def status_of(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_version_is_that_of_the_distribution(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"manylora {version('manylora')}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_subcommand(capsys, flag):
    main([flag])
    assert "manylora serve" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["server"], ["--port", "1"], ["--version", "serve"]])
def test_anything_else_shows_the_usage_and_ends_with_2(capsys, words):
    assert status_of(*words) == 2
    assert "usage: manylora serve" in capsys.readouterr().err


def test_help_of_serve_lists_every_flag_and_its_default(capsys):
    assert status_of("serve", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description.split()[0] in text
    assert "(default: 8000)" in text
    assert "MANYLORA_<FIELD>" in text


def test_serve_is_given_the_settings_and_its_status_is_the_commands(served):
    assert status_of("serve", "--port", "0", "--adapter", "a=/x") == 3
    assert served == [Settings(port=0, adapter=["a=/x"])]


@pytest.mark.parametrize(
    ("flag", "text", "limit"),
    [
        ("--port", "abc", "valid integer"),
        ("--port", "65536", "less than or equal to 65535"),
        ("--port", "-1", "greater than or equal to 0"),
        ("--device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("--dtype", "int8", "'float32', 'bfloat16'"),
        *(
            (flag, "0", "greater than 0")
            for flag in (
                "--pool-bytes",
                "--block-size",
                "--max-num-seqs",
                "--max-batched-tokens",
                "--max-context",
                "--max-adapters",
                "--max-adapter-rank",
                "--max-upload-bytes",
            )
        ),
    ],
)
def test_a_wrong_value_ends_with_2_and_names_flag_variable_value_and_limit(
    capsys, monkeypatch, served, flag, text, limit
):
    variable = "MANYLORA_" + flag.removeprefix("--").replace("-", "_").upper()
    assert status_of("serve", f"{flag}={text}") == 2
    by_flag = capsys.readouterr().err
    monkeypatch.setenv(variable, text)
    assert status_of("serve") == 2
    assert capsys.readouterr().err == by_flag
    for word in (flag, variable, repr(text), limit):
        assert word in by_flag
    assert by_flag.count("\n") == 1
    assert served == []


def test_every_wrong_value_is_named_at_once(capsys):
    assert status_of("serve", "--port", "x", "--max-adapters", "0") == 2
    said = capsys.readouterr().err
    assert "--port" in said
    assert "--max-adapters" in said


@pytest.mark.parametrize("words", [["--nonsense", "1"], ["stray"]])
def test_unknown_flags_and_words_end_with_2_and_are_named(capsys, served, words):
    assert status_of("serve", *words) == 2
    assert " ".join(words) in capsys.readouterr().err
    assert served == []


def test_an_adapter_variable_that_is_no_json_list_says_how_to_write_it(capsys, monkeypatch):
    monkeypatch.setenv("MANYLORA_ADAPTER", "json=/a/json")
    assert status_of("serve") == 2
    said = capsys.readouterr().err
    for word in ("MANYLORA_ADAPTER", "'json=/a/json'", '["NAME=DIR", "NAME=DIR"]', "--adapter"):
        assert word in said


def test_the_command_answers_before_anything_heavy_is_imported():
    code = (
        "import server.cli, sys; server.cli.main(['--version']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"manylora {version('manylora')}\n")
