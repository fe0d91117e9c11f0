"""Promises of the whole check: what is accepted, what is refused, and under which code."""

import math

import numpy as np
import pytest

from adapters_store.checking import check_adapter


def codes(report):
    return [problem.code for problem in report.problems]


@pytest.fixture
def check(layout, tmp_path):
    def run(adapter, layout=layout, **limits):
        directory = adapter.write(tmp_path / "adapter")
        return check_adapter(directory, layout, **{"max_rank": 64, **limits})

    return run


def test_accepts_a_plain_adapter_and_reports_what_it_found(check, adapter):
    report = check(adapter)
    assert report.accepted
    assert report.num_tensors == report.num_matched == 12
    assert [module.name for module in report.modules[:2]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert {(m.rank, m.alpha, m.scaling, m.dtype) for m in report.modules} == {(4, 8, 2.0, "F32")}
    assert report.num_rows == 24
    assert report.device_bytes == report.num_pages * 1024 * 4
    assert report.host_bytes > report.device_bytes
    assert len(report.digest) == 64


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-6), ("float16", 4e-3), ("bfloat16", 3e-2)]
)
def test_self_check_stays_within_rounding(check, adapter, make_layout, dtype, bound):
    report = check(adapter, make_layout(dtype))
    assert report.self_check.max_bound_ratio <= 1
    assert report.self_check.max_error < bound


def test_names_without_prefix_and_with_adapter_name_mean_the_same(check, adapter):
    digest = check(adapter).digest
    adapter.tensors = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in adapter.tensors.items()
    }
    assert check(adapter).digest == digest


def test_digest_changes_with_scaling_and_weights_but_not_with_metadata(check, adapter):
    plain = check(adapter).digest
    adapter.config["lora_dropout"] = 0.1
    adapter.config["base_model_name_or_path"] = "somebody/else"
    other_metadata = check(adapter)
    assert other_metadata.digest == plain
    assert [warning.code for warning in other_metadata.warnings] == ["other_base_name"]
    assert other_metadata.harmless_settings == ("lora_dropout=0.1: training only",)
    adapter.config["lora_alpha"] = 9
    scaled = check(adapter).digest
    assert scaled != plain
    next(iter(adapter.tensors.values()))[0, 0] += 1
    assert check(adapter).digest not in (plain, scaled)


def test_refuses_another_base_by_its_shapes(check, adapter, make_layout):
    report = check(adapter, make_layout(hidden=40))
    assert codes(report) == ["wrong_shape"]
    assert "[4, 36] and should be [4, 40]" in report.problems[0].message


def test_refuses_tensors_of_layers_that_the_base_lacks(check, adapter, make_layout):
    report = check(adapter, make_layout(num_layers=2))
    assert codes(report) == ["layer_out_of_range"]
    assert report.num_unmatched == 4


def test_refuses_an_adapter_with_fewer_layers_than_the_base(check, adapter, make_layout):
    assert codes(check(adapter, make_layout(num_layers=4))) == ["missing_tensors"]


def test_refuses_a_missing_half(check, adapter):
    del adapter.tensors[f"{adapter.key(1, 'q_proj')}.lora_B.weight"]
    report = check(adapter)
    assert codes(report) == ["missing_half"]
    assert "model.layers.1.self_attn.q_proj has no lora_B" in report.problems[0].message


def test_refuses_tensors_that_the_settings_do_not_target(check, adapter):
    adapter.config["target_modules"] = ["q_proj"]
    assert codes(check(adapter)) == ["tensors_not_targeted"]


def test_refuses_a_rank_that_differs_from_the_settings(check, adapter):
    adapter.config["rank_pattern"] = {r"layers\.1\.self_attn\.q_proj": 2}
    report = check(adapter)
    assert codes(report) == ["wrong_rank"]
    assert "has rank 4, the settings say 2" in report.problems[0].message


def test_refuses_a_rank_above_the_limit_and_names_both(check, adapter):
    report = check(adapter, max_rank=3)
    assert codes(report) == ["rank_too_high"]
    assert "limit of 3" in report.problems[0].message
    assert "has rank 4" in report.problems[0].message


def test_refuses_more_pages_than_one_adapter_may_have(check, adapter):
    report = check(adapter, max_pages=1)
    assert codes(report) == ["too_many_pages"]
    assert report.digest is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_nan_and_infinity(check, adapter, value):
    adapter.tensors[f"{adapter.key(2, 'q_proj')}.lora_B.weight"][5, 1] = value
    report = check(adapter)
    assert codes(report) == ["not_finite"]
    assert "model.layers.2.self_attn.q_proj.lora_B" in report.problems[0].message


def test_refuses_numbers_past_the_range_of_the_packed_dtype(check, adapter, make_layout):
    adapter.tensors[f"{adapter.key(2, 'q_proj')}.lora_B.weight"][5, 1] = 65520
    assert codes(check(adapter, make_layout("float16"))) == ["overflow"]
    assert check(adapter, make_layout("bfloat16")).accepted


def test_refuses_scalings_that_fp32_cannot_hold(check, adapter):
    adapter.config["lora_alpha"] = 1e-60
    assert codes(check(adapter)) == ["bad_scaling"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "unsupported_tensors"),
        ("model.embed_tokens.lora_embedding_A", "unsupported_tensors"),
        ("model.layers.0.self_attn.rotary.lora_A.weight", "unmatched_tensors"),
        ("model.layers.00.self_attn.q_proj.lora_A.weight", "unmatched_tensors"),
    ],
)
def test_refuses_tensors_that_it_cannot_serve(check, adapter, name, code):
    adapter.tensors[f"base_model.model.{name}"] = np.zeros(4, np.float32)
    assert codes(check(adapter)) == [code]


def test_refuses_a_tensor_under_two_spellings(check, adapter):
    key = f"{adapter.key(0, 'q_proj')}.lora_A.weight"
    adapter.tensors[key.removeprefix("base_model.model.")] = adapter.tensors[key]
    assert codes(check(adapter)) == ["duplicate_tensors"]


def test_refuses_an_adapter_without_tensors(check, adapter):
    adapter.tensors = {}
    assert codes(check(adapter)) == ["missing_tensors"]
    adapter.config["target_modules"] = ["nothing"]
    assert codes(check(adapter)) == ["empty_adapter"]


def test_refuses_embedding_and_head_targets(check, adapter):
    adapter.config["target_modules"] += ["lm_head", "embed_tokens"]
    report = check(adapter)
    assert codes(report) == ["unsupported_target"]
    assert "model.embed_tokens, lm_head" in report.problems[0].message


def test_warns_of_targets_that_this_base_lacks(check, adapter):
    adapter.config["target_modules"].append("w1")
    report = check(adapter)
    assert report.accepted
    assert [warning.code for warning in report.warnings] == ["unused_targets"]


def test_refuses_an_invalid_expression(check, adapter):
    adapter.config["target_modules"] = "model.(layers"
    assert codes(check(adapter)) == ["invalid_config"]


def test_refuses_pickles_and_says_how_to_convert(layout, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    report = check_adapter(tmp_path, layout, max_rank=8)
    assert codes(report) == ["pickle_weights"]
    assert "safe_serialization=True" in report.problems[0].remedy


def test_refuses_an_empty_directory(layout, tmp_path):
    assert codes(check_adapter(tmp_path, layout, max_rank=8)) == ["missing_file"] * 2


def test_reports_problems_of_settings_and_of_weights_together(check, adapter):
    adapter.config["use_dora"] = True
    adapter.tensors["model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = np.zeros(24, "f4")
    assert codes(check(adapter)) == ["unsupported_setting", "unsupported_tensors"]
