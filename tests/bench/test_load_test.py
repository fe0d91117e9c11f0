"""A load test against a scripted server: who is asked for what, and which figures come of it."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

from bench.load_test import LoadTest

SECONDS_PER_TOKEN = 0.1


class ScriptedServer:
    """Answers everything at once, a token every 100 ms; loads an adapter at its first request."""

    def __init__(self, known=(), answers_alike=False):
        self.asked = Counter()
        self.uploaded = []
        self._known = set(known)
        self._alike = answers_alike

    async def adapter_ids(self):
        return self._known

    async def upload(self, name, directory):
        assert (directory / "adapter_config.json").exists()
        self.uploaded.append(name)

    async def complete(self, prompt, name, num_tokens, arrived=lambda: None):
        self.asked[name] += 1
        for _ in range(num_tokens):
            await asyncio.sleep(SECONDS_PER_TOKEN)
            arrived()
        return num_tokens, "same" if self._alike else f"by {name}"

    async def metrics(self):
        loads = len(set(self.asked) - {None})
        return {
            "manylora_adapter_loads_total": loads,
            "manylora_adapter_evictions_total": 0,
            "manylora_preemptions_total": 0,
            "manylora_steps_total": 10 * sum(self.asked.values()),
        }


def load_test(server, **given):
    options = {
        "adapters": 4, "ranks": (4, 8), "lengths": (2, 6), "max_total": 10, "base_share": 0.0,
        "requests": 40, "slo_seconds": 6.0, "clients": 4, "saturation_requests": 40,
    }  # fmt: skip
    target = SimpleNamespace(name="q_proj", in_features=8, out_features=8)
    layout = SimpleNamespace(num_layers=1, targets=(target,), model_name="m")
    spec = SimpleNamespace(config=SimpleNamespace(vocab_size=100), layout=layout)
    return LoadTest(server, spec, argparse.Namespace(**options | given))


def test_adapters_that_are_not_there_are_uploaded_and_each_answers_its_own_way(
    tmp_path, virtual_run
):
    server = ScriptedServer(known=["bench-1-r8"])
    test = load_test(server, ranks=(8,))
    virtual_run(test.prepare(tmp_path))
    assert server.uploaded == ["bench-0-r8", "bench-2-r8", "bench-3-r8"]


def test_adapters_that_change_nothing_are_no_measurement(tmp_path, virtual_run):
    test = load_test(ScriptedServer(answers_alike=True))
    with pytest.raises(RuntimeError, match="give one answer to one prompt"):
        virtual_run(test.prepare(tmp_path))


def test_a_run_asks_the_adapters_of_its_trace(virtual_run):
    server = ScriptedServer()
    test = load_test(server)
    trace = test.traces("slora-1", rate=2.0, seed=0)["adapters"]
    found = virtual_run(test.play(trace))
    wanted = Counter(test.names[i] for i in trace.adapter.tolist())
    assert server.asked == wanted
    assert found["num_requests"] == 40
    assert (
        found["distinct_requested"] == len(wanted) == found["loads_per_second"] * found["seconds"]
    )
    assert found["first_token_p99_seconds"] == pytest.approx(SECONDS_PER_TOKEN)
    assert found["attainment"] == 1
    assert 0 < found["distinct_at_once"] <= found["most_distinct_at_once"] <= 4


def test_the_run_beside_it_asks_the_base_alone(virtual_run):
    server = ScriptedServer()
    test = load_test(server)
    found = virtual_run(test.play(test.traces("zipf-1", 2.0, seed=0)["base"]))
    assert server.asked == {None: 40}
    assert found["distinct_at_once"] == 0


def test_a_share_of_the_requests_goes_to_the_base(virtual_run):
    server = ScriptedServer()
    test = load_test(server, base_share=0.25)
    virtual_run(test.play(test.traces("zipf-1", 2.0, seed=0)["adapters"]))
    assert server.asked[None] == 10


def test_saturation_is_what_the_clients_get_answered(virtual_run):
    """Four clients, 2 to 5 tokens a request of 100 ms each: about 4 / 0.35 s."""
    found = virtual_run(load_test(ScriptedServer()).saturation("slora-1"))
    assert found.keys() == {"adapters", "base"}
    assert found["adapters"] == pytest.approx(4 / 0.35, rel=0.2)
