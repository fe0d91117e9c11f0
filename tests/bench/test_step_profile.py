"""Steps are held at the context that was asked for, and every second of one has one name."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import closing
from types import SimpleNamespace

import pytest

from bench import step_profile
from bench.engine_session import store_adapters
from bench.held_steps import Case, HeldStep, StepEngine
from bench.record import engine_settings
from bench.step_check import MAX_ERROR, OPERATIONS, check
from bench.step_profile import Gemm, Round, Stopwatch
from bench.step_profile_table import REST, SCHEDULE, bars, report
from server.engine import batch, runner
from server.engine.plan import StepPlan
from server.engine.spec import engine_spec
from server.model.linear import Linear

DECODE = Case("decode", num_rows=3, num_adapters=2, context=20)
PREFILL = Case("prefill", num_rows=2, num_adapters=2, context=8)


def options(**given):
    sizes = {"rows": (1, 8, 32), "adapters": (8, 32), "context": 160, "prefill": 512}
    return Namespace(
        **{"model": None, "quick": True, "device": "cpu", "dtype": "auto"} | sizes | given
    )


def settings(directory, **given):
    return engine_settings(options(), directory, max_adapters=2, **given)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The tiny model with two adapters of rank 4."""
    directory = tmp_path_factory.mktemp("engine")
    images = store_adapters(engine_spec(settings(directory)), (4, 4), directory)
    with closing(StepEngine(settings(directory), images)) as engine:
        yield engine


@pytest.mark.parametrize(("case", "start", "num_tokens"), [(DECODE, 19, 1), (PREFILL, 0, 8)])
def test_a_held_step_is_that_of_its_case(engine, case, start, num_tokens):
    held = engine.hold(case)
    assert [(i.start, i.num_tokens) for i in held.plan.items] == [
        (start, num_tokens)
    ] * case.num_rows
    assert held.plan.num_tokens == case.num_tokens
    assert {item.slot for item in held.plan.items} == {0, 1}
    assert all(item.samples for item in held.plan.items)


def test_a_held_step_computes_the_same_each_time(engine):
    held = engine.hold(DECODE)
    first = engine.runner.run(held.plan)
    assert engine.runner.run(held.plan) == first
    assert [item.sequence.num_tokens for item in held.plan.items] == [20] * 3


def test_only_decodes_tell_the_schedulers_time(engine):
    assert len(engine.hold(DECODE).schedule_seconds) == 8
    assert engine.hold(PREFILL).schedule_seconds == ()


def test_a_pool_without_room_is_refused_with_the_remedy(tmp_path):
    small = settings(tmp_path, pool_bytes=1 << 16)
    with closing(StepEngine(small, [])) as engine, pytest.raises(RuntimeError, match="POOL_BYTES"):
        engine.hold(Case("decode", 8, 0, 400))


@pytest.mark.parametrize("case", [DECODE, PREFILL])
def test_every_operation_is_held_against_the_reference_kernel(engine, case):
    errors = check(engine, [case])
    assert errors.keys() == set(OPERATIONS)
    assert all(0 <= error <= MAX_ERROR for error in errors.values())


@pytest.mark.parametrize("operation", ["silu_mul", "paged_attention", "rms_norm"])
def test_a_kernel_that_returns_something_else_is_not_timed(engine, operation, monkeypatch):
    right = getattr(engine.kernels, operation)
    monkeypatch.setattr(engine.kernels, operation, lambda *args, **more: 1.1 * right(*args, **more))
    with pytest.raises(RuntimeError, match=rf"{operation} is 0\.1\d* of its size"):
        check(engine, [DECODE])


@pytest.mark.parametrize("operation", ["add_adapters", "rope_store_kv"])
def test_a_kernel_that_changes_nothing_is_not_timed(engine, operation, monkeypatch):
    monkeypatch.setattr(engine.kernels, operation, lambda *_: None)
    with pytest.raises(RuntimeError, match=f"{operation} is "):
        check(engine, [PREFILL])


def test_numbers_that_are_none_are_not_timed(engine, monkeypatch):
    right = engine.kernels.silu_mul
    monkeypatch.setattr(engine.kernels, "silu_mul", lambda x: right(x) * float("nan"))
    with pytest.raises(RuntimeError, match="is nan of its size"):
        check(engine, [DECODE])


def test_every_operation_is_timed_and_all_is_put_back(engine):
    held = engine.hold(DECODE)
    places = [(batch, "build"), (runner, "sample"), (Linear, "forward")]
    places += [(engine.kernels, name) for name in OPERATIONS]
    before = [getattr(owner, name) for owner, name in places]
    watch = Stopwatch("cpu")
    plain = engine.runner.run(held.plan)
    with step_profile.timers(engine.kernels, watch):
        assert engine.runner.run(held.plan) == plain
    assert [getattr(owner, name) for owner, name in places] == before
    products = {gemm.label for gemm in step_profile.gemms(engine, held)}
    assert watch.seconds.keys() == {"batch", *OPERATIONS, *products, "sample"}


@pytest.mark.parametrize("case", [DECODE, PREFILL])
def test_the_products_are_all_of_the_step(engine, case):
    products = step_profile.gemms(engine, engine.hold(case))
    shapes = {(32, 64), (32, 32), (32, 96), (48, 32), (32, 257)}
    assert {(g.linear.in_features, g.linear.out_features) for g in products} == shapes
    assert len({id(gemm.linear) for gemm in products}) == len(products) == 2 * 4 + 1
    layers = 2 * (32 * 64 + 32 * 32 + 32 * 96 + 48 * 32)
    wanted = 2 * (case.num_tokens * layers + case.num_rows * 32 * 257)
    assert sum(gemm.num_flops for gemm in products) == wanted


def test_cases_are_the_base_and_the_adapters_that_the_rows_can_use():
    found = step_profile.cases(options())
    assert [(c.phase, c.num_rows, c.num_adapters, c.context) for c in found] == [
        ("decode", 1, 0, 160), ("decode", 1, 1, 160),
        ("decode", 8, 0, 160), ("decode", 8, 8, 160),
        ("decode", 32, 0, 160), ("decode", 32, 8, 160), ("decode", 32, 32, 160),
        ("prefill", 1, 0, 512), ("prefill", 1, 1, 512),
        ("prefill", 8, 0, 64), ("prefill", 8, 8, 64),
        ("prefill", 32, 0, 16), ("prefill", 32, 8, 16), ("prefill", 32, 32, 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"context": 1}, "--context 1"), ({"prefill": 63}, "--prefill 63: fewer than 2 .* 32")],
)
def test_sizes_that_make_no_step_are_refused_with_the_remedy(wrong, message):
    with pytest.raises(ValueError, match=message):
        step_profile.cases(options(**wrong))


def scripted_row(num_rows, num_adapters=0, *, gemm=0.030, alone=0.027):
    """Two rounds of 40 ms with timers, scheduling in them; an outlier makes no third."""
    linear = SimpleNamespace(in_features=10, out_features=100)
    product = Gemm(linear, [0.0] * num_rows, None)
    operations = {product.label: gemm, "sample": 0.001}
    once = Round(0.037, 0.038, operations, {product.label: alone})
    held = HeldStep(Case("decode", num_rows, num_adapters, 20), StepPlan(()), (0.002, 0.001, 0.9))
    return step_profile.row(held, [product], [once, once])


def test_shares_are_of_the_step_with_its_scheduling():
    row = scripted_row(32)
    assert row["step_seconds"]["median"] == pytest.approx(0.039)
    assert row["timed_step_seconds"]["median"] == pytest.approx(0.040)
    shares = {label: found["share"] for label, found in row["operations"].items()}
    wanted = {SCHEDULE: 0.05, "linear 10 -> 100": 0.75, "sample": 0.025, REST: 0.175}
    assert shares == pytest.approx(wanted)
    assert row["non_gemm_share"]["median"] == pytest.approx(0.25)
    assert row["gemm_rate_of_alone"]["median"] == pytest.approx(0.9)
    assert row["gemm_flops_per_second"] == pytest.approx(2 * 32 * 10 * 100 / 0.030)


def test_the_bars_are_those_of_the_base_models_decode_of_32_rows():
    rows = [scripted_row(8), scripted_row(32, 8, gemm=0.001), scripted_row(32, gemm=0.031)]
    share, rate = bars(rows)
    assert (share["value"], share["at_most"]) == (pytest.approx(1 - 0.031 / 0.040), 0.25)
    assert (rate["value"], rate["at_least"]) == (pytest.approx(27 / 31), 0.85)
    assert share["holds"]
    assert rate["holds"]
    assert bars(rows[:2]) == []


def test_a_bar_that_is_missed_is_said_to_be():
    rows = [scripted_row(32, gemm=0.028, alone=0.020)]
    text = report({"rows": rows, "bars": bars(rows)})
    assert "non-GEMM share of a 32-row decode step, base model: 0.300, at most 0.25: MISSED" in text
    assert text.endswith("base model: 0.714, at least 0.85: MISSED")


def test_the_script_runs_at_its_smallest_size(tmp_path, monkeypatch, capsys):
    output = tmp_path / "profile.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--device", "cpu", "--output", str(output)])
    step_profile.main()
    record = json.loads(output.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == output.read_text().strip()
    found = [(r["phase"], r["num_rows"], r["num_adapters"]) for r in record["rows"]]
    assert found == [(p, n, a) for p in ("decode", "prefill") for n in (1, 2) for a in (0, n)]
    for row in record["rows"]:
        assert ("add_adapters" in row["operations"]) == (row["num_adapters"] > 0)
        assert sum(f["share"] for f in row["operations"].values()) == pytest.approx(1, abs=1e-3)
