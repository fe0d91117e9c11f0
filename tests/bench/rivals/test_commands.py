"""The rivals' processes and requests: which cases, which adapters, which settings."""

import pytest

from bench.rivals import run
from bench.rivals.llamacpp import LlamaCpp
from bench.rivals.run import RIVALS, cases_of, parse
from bench.rivals.scripts import CONTINUOUS_BATCHING, PEFT_MIXED_BATCH
from bench.rivals.vllm import Vllm
from bench.rivals.workload import Case

CASES = cases_of((1, 8, 32), (8, 32))


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_no_case_has_more_adapters_than_requests_in_flight():
    assert [Case(1, 0), Case(8, 0), Case(8, 8), Case(32, 0), Case(32, 8), Case(32, 32)] == CASES


@pytest.mark.parametrize("rival", RIVALS.values(), ids=lambda rival: rival.name)
def test_every_launch_answers_cases_and_has_their_adapters(rival):
    for launch in rival.launches(CASES):
        assert launch.cases
        assert set(launch.cases) <= set(CASES)
        assert launch.num_adapters >= max(case.num_adapters for case in launch.cases)


def test_vllm_runs_the_base_with_lora_off_and_on():
    off, on, many = Vllm().launches(CASES)
    assert "--enable-lora" not in off.command
    assert [case.num_adapters for case in off.cases] == [0, 0, 0]
    assert on.cases == (Case(1, 0), Case(8, 0), Case(32, 0), Case(8, 8), Case(32, 8))
    assert many.cases == (Case(32, 32),)


def test_vllm_has_room_for_one_adapter_more_than_are_used():
    _, on, many = Vllm().launches(CASES)
    assert [value_of(launch.command, "--max-loras") for launch in (on, many)] == ["9", "33"]
    assert on.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_llamacpp_has_a_slot_for_each_request_in_flight():
    launches = LlamaCpp().launches(CASES)
    assert [value_of(launch.command, "--parallel") for launch in launches] == [
        str(case.concurrency) for case in CASES
    ]
    assert ["--lora" in launch.command for launch in launches] == [
        bool(case.num_adapters) for case in CASES
    ]


def test_llamacpp_is_told_outright_to_apply_no_adapter():
    assert LlamaCpp().request([1], 4, None).body["lora"] == [{"id": 0, "scale": 0.0}]
    assert LlamaCpp().request([1], 4, 3).body["lora"] == [{"id": 3, "scale": 1.0}]


def test_peft_answers_for_adapters_and_transformers_for_the_base():
    for rival, has_adapters in ((PEFT_MIXED_BATCH, True), (CONTINUOUS_BATCHING, False)):
        for launch in rival.launches(CASES):
            own = tuple(case for case in CASES if bool(case.num_adapters) is has_adapters)
            assert launch.cases == own


def test_peft_is_tried_with_one_thread_and_with_two():
    threads = {
        launch.variant: launch.environment["OMP_NUM_THREADS"]
        for launch in PEFT_MIXED_BATCH.launches(CASES)
    }
    assert threads == {"one thread": "1", "two threads": "2"}


def test_every_rival_is_run_unless_some_are_named():
    assert parse([]).rivals == tuple(RIVALS)
    assert parse(["--rivals", "peft,vllm"]).rivals == ("peft", "vllm")


def test_an_unknown_rival_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        parse(["--rivals", "vllm,tgi"])
    assert "['tgi'] are none of vllm, llamacpp" in capsys.readouterr().err


def test_a_rival_that_is_not_set_up_is_named_with_the_remedy(monkeypatch):
    rival = Vllm()
    monkeypatch.setattr(rival, "problem", lambda: "run `python -m bench.rivals.setup vllm`")
    monkeypatch.setitem(run.RIVALS, "vllm", rival)
    monkeypatch.setattr("sys.argv", ["run", "--rivals", "vllm"])
    with pytest.raises(SystemExit, match=r"not set up: vllm: run `python -m bench\.rivals\.setup"):
        run.main()
