"""One server from start to end: what it registers, how it fails, how it stops."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from adapters_store.store import AdapterStore
from server.config import Settings
from server.engine.client import EngineStartError
from server.engine.process import settled
from server.engine.request import Settled
from server.engine.spec import engine_spec
from server.errors import CannotServe
from server.frontend import _tokenizer
from server.registration import register_adapters
from server.serve import serve

STOP_SECONDS, WATCHDOG_SECONDS = 60, 180


def write_adapter(directory: Path, seed: int, **changes) -> Path:
    """A PEFT directory for the tiny model; other seeds, other weights."""
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny-llama",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{path}.lora_A.weight"] = random.standard_normal((4, 32), dtype=np.float32)
        weights[f"{path}.lora_B.weight"] = random.standard_normal((32, 4), dtype=np.float32)
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture
def settings_of(tiny_llama, tmp_path):
    """settings_of(**changes): the tiny model on any free port, data under tmp_path."""
    defaults = {
        "model": str(tiny_llama),
        "device": "cpu",
        "dtype": "float32",
        "port": 0,
        "data_dir": tmp_path / "data",
        "pool_bytes": 1 << 20,
    }
    return lambda **changes: Settings(**(defaults | changes))


@pytest.fixture
def store(settings_of) -> Iterator[AdapterStore]:
    settings = settings_of()
    layout = engine_spec(settings).layout
    with contextlib.closing(
        AdapterStore(settings.data_dir, layout, max_rank=8, max_pages=None)
    ) as store:
        yield store


@pytest.fixture
def shipped(monkeypatch, tmp_path) -> None:
    """Two adapters ship with the code: pirate and shout."""
    found = {
        name: write_adapter(tmp_path / "shipped" / name, seed)
        for seed, name in enumerate(("pirate", "shout"))
    }
    monkeypatch.setattr("server.registration.shipped_adapters", lambda: found)


class ScriptedEngine:
    """In place of the process: `start` does what a test wants; remembers that it was stopped."""

    started = load = pid = None
    on_start = on_settle = on_spawn = staticmethod(lambda: None)
    instances: list[ScriptedEngine]

    def __init__(self, settings) -> None:
        self.settings = settings
        self.is_stopped = False
        self.instances.append(self)

    def spawn(self) -> None:
        self.on_spawn()

    async def settle(self) -> Settled:
        self.on_settle()
        return settled(engine_spec(self.settings))

    async def start(self) -> None:
        self.on_start()

    async def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def engine(monkeypatch) -> type[ScriptedEngine]:
    """A fresh scripted engine class, which `serve` uses."""
    scripted = type("Scripted", (ScriptedEngine,), {"instances": []})
    monkeypatch.setattr("server.serve.EngineClient", scripted)
    return scripted


def send(number: signal.Signals):
    return staticmethod(lambda: os.kill(os.getpid(), number))


def names_in(store: AdapterStore) -> list[str]:
    return [adapter.adapter_id for adapter in store.adapters()]


# What is registered.


def test_the_embedded_model_brings_the_shipped_adapters(store, shipped, settings_of):
    register_adapters(settings_of(model="embedded"), store)
    assert names_in(store) == ["pirate", "shout"]


@pytest.mark.parametrize("changes", [{}, {"model": "embedded", "shipped_adapters": False}])
def test_another_model_or_the_switch_leaves_them_out(store, shipped, settings_of, changes):
    register_adapters(settings_of(**changes), store)
    assert names_in(store) == []


def test_a_users_own_adapter_of_a_shipped_name_stays(store, shipped, settings_of, tmp_path):
    own = store.add("pirate", write_adapter(tmp_path / "own", seed=77))
    register_adapters(settings_of(model="embedded"), store)
    assert store.resolve("pirate").digest == own.digest
    assert len(store.get("pirate").versions) == 1
    assert names_in(store) == ["pirate", "shout"]


def test_named_directories_are_registered_and_again_after_a_change(store, settings_of, tmp_path):
    first, second = (write_adapter(tmp_path / str(seed), seed) for seed in (1, 2))
    for directory in (first, first, second):
        register_adapters(settings_of(adapter=[f"acme/law={directory}", f"b={first}"]), store)
    assert names_in(store) == ["acme/law", "b"]
    assert [v.version for v in store.get("acme/law").versions] == [1, 2]


@pytest.mark.parametrize("entry", ["law", "law=", "law=/nonexistent", "=", ""])
def test_an_entry_that_is_not_name_and_directory_is_quoted(store, settings_of, entry):
    with pytest.raises(CannotServe) as refused:
        register_adapters(settings_of(adapter=[entry]), store)
    assert repr(entry) in str(refused.value)
    assert "NAME=DIR" in str(refused.value)


def test_a_directory_that_cannot_be_served_is_named_with_the_reason(store, settings_of, tmp_path):
    directory = write_adapter(tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(CannotServe) as refused:
        register_adapters(settings_of(adapter=[f"law={directory}"]), store)
    assert f"--adapter law={directory}" in str(refused.value)
    assert "use_dora" in str(refused.value)
    with pytest.raises(CannotServe, match="bad name"):
        register_adapters(settings_of(adapter=[f"bad name={directory}"]), store)


# How it fails: a message with a remedy, and status 1.


def test_a_port_in_use_is_named_with_what_to_do(settings_of, capsys, engine):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert serve(settings_of(port=port)) == 1
    said = capsys.readouterr().err
    for word in (f"port {port}", "in use", "--port", "0 picks a free port"):
        assert word in said
    assert engine.instances == [], "the port is tried before anything is loaded"


@pytest.mark.parametrize("host", ["203.0.113.1", "a..b"])
def test_a_host_that_is_not_ours_is_named(settings_of, capsys, engine, host):
    assert serve(settings_of(host=host)) == 1
    said = capsys.readouterr().err
    assert f"cannot listen on {host} port 0" in said
    assert "--host" in said


def test_a_model_that_is_not_there_is_named(settings_of, capsys):
    assert serve(settings_of(model="/nonexistent/model.gguf")) == 1
    assert capsys.readouterr().err == "manylora: there is no file /nonexistent/model.gguf\n"


def test_an_adapter_directory_that_is_not_there_is_named_first(settings_of, capsys, engine):
    assert serve(settings_of(adapter=["law=/nonexistent"])) == 1
    assert "--adapter 'law=/nonexistent'" in capsys.readouterr().err
    assert engine.instances == [], "nothing was begun"


def test_an_engine_that_refuses_ends_the_server_with_its_words(settings_of, capsys, engine):
    def refuse() -> None:
        raise EngineStartError("tiny has layers of wood: give it others")

    engine.on_settle = staticmethod(refuse)
    assert serve(settings_of()) == 1
    assert "manylora: tiny has layers of wood: give it others" in capsys.readouterr().err
    assert engine.instances[0].is_stopped


def test_a_model_without_a_tokenizer_is_named(settings_of, capsys, engine, tiny_llama, tmp_path):
    model = tmp_path / "mute"
    model.mkdir()
    shutil.copy(tiny_llama / "config.json", model)
    assert serve(settings_of(model=str(model))) == 1
    assert "the tokenizer of mute" in capsys.readouterr().err
    assert engine.instances[0].is_stopped


def test_a_data_directory_that_cannot_be_one_is_named(settings_of, capsys, engine, tmp_path):
    (tmp_path / "file").write_text("")
    assert serve(settings_of(data_dir=tmp_path / "file")) == 1
    said = capsys.readouterr().err
    assert f"cannot keep adapters in {tmp_path / 'file'}" in said
    assert "--data-dir" in said
    assert engine.instances[0].is_stopped


def test_a_data_directory_of_another_server_is_named(settings_of, capsys, engine, store, tmp_path):
    assert serve(settings_of()) == 1
    assert str(tmp_path / "data") in capsys.readouterr().err
    assert engine.instances[0].is_stopped


def test_an_engine_that_does_not_start_ends_the_server(settings_of, capsys, engine):
    def fail() -> None:
        raise EngineStartError("the engine ended with exit code 7 before it served")

    engine.on_start = staticmethod(fail)
    assert serve(settings_of()) == 1
    assert "exit code 7" in capsys.readouterr().err
    assert engine.instances[0].is_stopped


def test_a_base_model_and_an_adapter_of_one_name_are_refused(settings_of, capsys, engine, tmp_path):
    directory = write_adapter(tmp_path / "law", 1)
    settings = settings_of(served_model_name="law", adapter=[f"law={directory}"])
    assert serve(settings) == 1
    said = capsys.readouterr().err
    assert "both called 'law'" in said
    assert "--served-model-name" in said
    assert engine.instances[0].is_stopped


def test_answers_end_by_the_end_tokens_of_tokenizer_and_config(settings_of):
    settings = settings_of()
    message = settled(engine_spec(settings))
    assert _tokenizer(settings, message).eos_token_ids == (256,)
    more = msgspec.structs.replace(message, eos_token_ids=(7, 256))
    assert _tokenizer(settings, more).eos_token_ids == (256, 7)


# How it stops.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["on_spawn", "on_settle", "on_start"])
def test_a_signal_stops_the_engine_and_gives_the_data_back(settings_of, engine, moment, number):
    setattr(engine, moment, send(number))
    settings = settings_of()
    assert serve(settings) == 0
    assert [scripted.is_stopped for scripted in engine.instances] == [True]
    layout = engine_spec(settings).layout
    AdapterStore(settings.data_dir, layout, max_rank=8, max_pages=None).close()


def ask(url: str, **body) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps({"messages": [{"role": "user", "content": "hi"}], **body}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextlib.contextmanager
def running_command(words: list[str], temporary: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """`manylora serve` and the banner that it shows when it is ready; killed if it hangs."""
    server = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", *words],
        env=os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(WATCHDOG_SECONDS, server.kill)
    watchdog.start()
    try:
        with server:
            banner = ""
            for line in server.stdout:
                banner += line
                if line.startswith("or open"):
                    break
            yield server, banner
    finally:
        server.kill()
        watchdog.cancel()
        watchdog.join()


def test_the_command_serves_base_and_adapter_and_leaves_nothing_behind(tiny_llama, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", seed=3)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--port", "0"]
    words += ["--device", "cpu", "--dtype", "float32", "--data-dir", str(tmp_path / "data")]
    words += ["--pool-bytes", "1000000", "--block-size", "8", "--max-context", "64"]
    words += ["--max-num-seqs", "4", "--max-batched-tokens", "16", "--max-adapters", "2"]
    words += ["--max-adapter-rank", "8", "--adapter", f"acme/law={adapter}"]
    with running_command(words, temporary) as (server, banner):
        assert "manylora serves tiny (float32 on cpu)" in banner
        assert "adapters: acme/law" in banner
        url = re.search(r"http://127\.0\.0\.1:\d+", banner)[0]
        settings = {"max_tokens": 8, "temperature": 0}
        base = ask(url, model="tiny", **settings)
        law = ask(url, model="acme/law", **settings)
        assert base["model"] == "tiny"
        assert base["usage"]["completion_tokens"] == law["usage"]["completion_tokens"] == 8
        assert base["choices"][0]["message"] != law["choices"][0]["message"]
        children = psutil.Process(server.pid).children(recursive=True)
        assert children, "the engine is no process of its own"
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_SECONDS) == 0
        _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
        assert not alive
    assert list(temporary.iterdir()) == []
