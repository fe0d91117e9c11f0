"""Promises of the settings' reader: every key is honoured, harmless, or refused by name."""

import json

import pytest

from adapters_store.errors import FileRefused
from adapters_store.peft_config import MAX_CONFIG_BYTES, read_config

PLAIN = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}


def read(**changes):
    return read_config(json.dumps({**PLAIN, **changes}).encode())


def test_accepts_what_peft_writes_for_a_plain_adapter():
    from peft import LoraConfig

    written = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").to_dict()
    raw = json.dumps(written, default=list).encode()
    reading = read_config(raw)
    assert reading.problems == ()
    assert sorted(reading.settings.target_modules) == ["q_proj", "v_proj"]


def test_knows_every_key_of_the_installed_peft():
    from dataclasses import fields

    from peft import LoraConfig

    from adapters_store.peft_config import LoraSettings
    from adapters_store.peft_settings import HARMLESS, REFUSED_UNLESS_OFF

    special = {"peft_type", "task_type", "init_lora_weights"}
    honoured = {entry.name for entry in fields(LoraSettings)}
    known = special | honoured | HARMLESS.keys() | REFUSED_UNLESS_OFF.keys()
    assert {entry.name for entry in fields(LoraConfig)} <= known


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [3]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something_new"),
        ("init_lora_weights", 1),
    ],
)
def test_refuses_settings_that_change_the_arithmetic_by_name(key, value):
    reading = read(**{key: value})
    assert reading.settings is None
    assert [problem.code for problem in reading.problems] == ["unsupported_setting"]
    assert key in reading.problems[0].message
    assert reading.problems[0].remedy


@pytest.mark.parametrize("value", [True, 0, 1.5, "x", [1], {"a": 1}])
def test_refuses_unknown_settings_that_are_not_off(value):
    reading = read(new_scaling_rule=value)
    assert [problem.code for problem in reading.problems] == ["unknown_setting"]
    assert "new_scaling_rule" in reading.problems[0].message


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_settings_that_are_off_do_not_matter(value):
    assert read(new_scaling_rule=value, use_dora=value).problems == ()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_accepts_initialisations_that_leave_the_base_alone(init):
    assert read(init_lora_weights=init).problems == ()


def test_lists_harmless_settings_with_the_reason():
    reading = read(lora_dropout=0.05, inference_mode=True, loftq_config={}, revision=None)
    assert reading.harmless == (
        "inference_mode=true: training only",
        "lora_dropout=0.05: training only",
    )


@pytest.mark.parametrize("peft_type", ["IA3", "ADALORA", "PREFIX_TUNING", None, 3])
def test_refuses_other_peft_types(peft_type):
    assert [p.code for p in read(peft_type=peft_type).problems] == ["unsupported_peft_type"]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_refuses_other_tasks(task_type):
    assert [p.code for p in read(task_type=task_type).problems] == ["unsupported_task_type"]


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -1},
        {"r": True},
        {"r": "8"},
        {"r": 10**400},
        {"r": 4.5},
        {"lora_alpha": "16"},
        {"lora_alpha": 10**400},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": 1e300}},
        {"target_modules": None},
        {"target_modules": [1]},
        {"use_rslora": "yes"},
        {"layers_to_transform": [1.5]},
        {"layers_pattern": ["layers"]},
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
    ],
)
def test_refuses_values_of_a_wrong_type_or_range(changes):
    reading = read(**changes)
    assert reading.settings is None
    assert {problem.code for problem in reading.problems} == {"invalid_config"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"r": 1, "r": 2}',
        b'{"rank_pattern": {"a": 1, "a": 2}}',
        b'{"lora_alpha": NaN}',
        b'{"lora_alpha": Infinity}',
        b"[" * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (MAX_CONFIG_BYTES + 1),
    ],
)
def test_refuses_what_is_not_one_sound_json_object(raw):
    with pytest.raises(FileRefused, match=r"adapter_config\.json"):
        read_config(raw)


def test_overflowing_alpha_is_refused_although_json_reads_it_as_infinity():
    raw = b'{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 1e999}'
    assert [p.code for p in read_config(raw).problems] == ["invalid_config"]


def test_nulls_mean_the_default():
    settings = read(rank_pattern=None, alpha_pattern=None, layers_pattern=None).settings
    assert settings.rank_pattern == {}
    assert settings.layers_pattern == ()
