"""Every setting has a flag and a variable that mean the same, and the flag wins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.cli import parse_settings
from server.config import EMBEDDED_MODEL, Settings

SECOND_VALUES = {
    "model": ("acme/base-1b", "acme/base-1b"),
    "served_model_name": ("base", "base"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "device": ("cuda", "cuda"),
    "dtype": ("float32", "float32"),
    "quantization": ("int8", "int8"),
    "data_dir": ("/var/lib/adapters", Path("/var/lib/adapters")),
    "pool_bytes": ("1000000", 1_000_000),
    "adapter_memory_share": ("0.25", 0.25),
    "block_size": ("8", 8),
    "max_num_seqs": ("3", 3),
    "max_batched_tokens": ("100", 100),
    "max_queue": ("7", 7),
    "max_queue_per_adapter": ("5", 5),
    "queue_timeout": ("2.5", 2.5),
    "fairness": ("user", "user"),
    "max_passes": ("3", 3),
    "max_context": ("2048", 2048),
    "max_adapters": ("9", 9),
    "max_adapter_rank": ("16", 16),
    "host_memory_bytes": ("0", 0),
    "load_threads": ("3", 3),
    "load_bytes_per_second": ("1000000", 1_000_000),
    "load_timeout_seconds": ("2.5", 2.5),
    "max_upload_bytes": ("4096", 4096),
}
"""Field → the text of a flag or variable, and what it means."""

OTHER_FIELDS = {
    "adapter",
    "tenant_weights",
    "shipped_adapters",
    "prefix_cache",
    "cuda_graphs",
}  # a list, switches: one by one


@pytest.fixture(autouse=True)
def no_variables(monkeypatch) -> None:
    """The caller's own environment sets nothing."""
    for name in os.environ:
        if name.upper().startswith("MANYLORA_"):
            monkeypatch.delenv(name)


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    return "MANYLORA_" + field.upper()


def test_the_tests_below_set_every_field():
    assert SECOND_VALUES.keys() | OTHER_FIELDS == Settings.model_fields.keys()


@pytest.mark.parametrize("field", SECOND_VALUES)
def test_flag_and_variable_mean_the_same_and_change_nothing_else(field, monkeypatch):
    text, value = SECOND_VALUES[field]
    by_flag = parse_settings([flag_of(field), text])
    assert getattr(by_flag, field) == value != getattr(Settings(), field)
    assert parse_settings([f"{flag_of(field)}={text}"]) == by_flag
    assert by_flag == Settings().model_copy(update={field: value})
    monkeypatch.setenv(variable_of(field), text)
    assert parse_settings([]) == by_flag


def test_a_flag_wins_over_its_variable(monkeypatch):
    monkeypatch.setenv("MANYLORA_PORT", "1")
    monkeypatch.setenv("MANYLORA_MAX_ADAPTERS", "2")
    settings = parse_settings(["--port", "9000"])
    assert (settings.port, settings.max_adapters) == (9000, 2)


def test_adapters_come_from_repeated_flags_or_a_json_list(monkeypatch):
    by_flag = parse_settings(["--adapter", "json=/a/json", "--adapter", "acme/law=/b c/law"])
    assert by_flag.adapter == ["json=/a/json", "acme/law=/b c/law"]
    monkeypatch.setenv("MANYLORA_ADAPTER", '["json=/a/json", "acme/law=/b c/law"]')
    assert parse_settings([]) == by_flag
    assert parse_settings(["--adapter", "only=/c"]).adapter == ["only=/c"]


def test_weights_come_from_repeated_flags_or_a_json_object(monkeypatch):
    by_flag = parse_settings(["--tenant-weights", "gold=3", "--tenant-weights", "acme/law=0.5"])
    assert by_flag.tenant_weights == {"gold": 3.0, "acme/law": 0.5}
    monkeypatch.setenv("MANYLORA_TENANT_WEIGHTS", '{"gold": 3, "acme/law": 0.5}')
    assert parse_settings([]) == by_flag


@pytest.mark.parametrize(
    ("flag", "variable", "words"),
    [
        ("gold=0", None, ("gold", "greater than 0", "'0'")),
        ("gold", None, ("--tenant-weights NAME=WEIGHT",)),
        (None, "gold=3", ("MANYLORA_TENANT_WEIGHTS", "'gold=3'", '{"NAME": WEIGHT}')),
    ],
)
def test_weights_that_cannot_be_read_are_refused(monkeypatch, capsys, flag, variable, words):
    if variable is not None:
        monkeypatch.setenv("MANYLORA_TENANT_WEIGHTS", variable)
    with pytest.raises(SystemExit, match="2"):
        parse_settings([] if flag is None else ["--tenant-weights", flag])
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_the_description_of_adapters_says_how_to_write_the_variable():
    description = Settings.model_fields["adapter"].description
    assert '["NAME=DIR", "NAME=DIR"]' in description


@pytest.mark.parametrize("text", ["false", "0"])
@pytest.mark.parametrize("field", ["shipped_adapters", "prefix_cache", "cuda_graphs"])
def test_what_is_on_can_be_switched_off(monkeypatch, field, text):
    by_flag = parse_settings(["--no-" + flag_of(field).removeprefix("--")])
    assert getattr(by_flag, field) is False
    monkeypatch.setenv(variable_of(field), text)
    assert parse_settings([]) == by_flag
    assert getattr(parse_settings([flag_of(field)]), field) is True


def test_without_flags_and_variables_the_embedded_model_is_served_on_this_machine():
    settings = parse_settings([])
    assert settings == Settings()
    assert (settings.model, settings.host, settings.port) == (EMBEDDED_MODEL, "127.0.0.1", 8000)
    assert settings.shipped_adapters is True


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_field_is_described(field):
    assert Settings.model_fields[field].description.endswith(".")
