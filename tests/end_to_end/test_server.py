"""The real processes: the command, real clients, uploads, and kill -9 of either process."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

START_SECONDS = 240  # a bound, not a wait: a slow machine that compiles the kernels first
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model_with_tokenizer(tiny_model) -> Path:
    """The tiny model with a tokenizer of one token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {character: len(vocabulary) + i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny_model)
    return tiny_model


class RunningServer:
    """One `manylora serve` process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120)

    @property
    def engine_pid(self) -> int:
        """Of the engine process: the only child with threads of its own work."""
        children = psutil.Process(self.process.pid).children()
        return next(c.pid for c in children if "spawn_main" in " ".join(c.cmdline()))

    def names(self) -> list[str]:
        return [model["id"] for model in self.http.get("/v1/models").json()["data"]]


@contextmanager
def running_server(model: Path | str, data_dir: Path, *flags: str):
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model), "--port", "0"]
    command += ["--data-dir", str(data_dir), "--device", "cpu", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = RunningServer(process, _address(process))
            with server.http:
                yield server
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
            return match[1]
    raise AssertionError(f"the server ended with {process.wait()} before it served")


def adapter_flags(adapters: dict[str, Path]) -> list[str]:
    return [flag for name, path in adapters.items() for flag in ("--adapter", f"{name}={path}")]


@pytest.fixture(scope="module")
def server(model_with_tokenizer, tiny_adapters, tmp_path_factory):
    names = list(tiny_adapters)[:8]
    flags = adapter_flags({name: tiny_adapters[name] for name in names})
    data_dir = tmp_path_factory.mktemp("server-data")
    with running_server(model_with_tokenizer, data_dir, "--dtype", "float32", *flags) as running:
        yield running


async def stream_text(client: openai.AsyncOpenAI, base: str, adapter: str | None, prompt: str):
    """The text of one greedy stream, and the adapter that its chunks name."""
    extra = {"ignore_eos": True} | ({"adapter_id": adapter} if adapter else {})
    stream = await client.chat.completions.create(
        model=base,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=24,
        stream=True,
        extra_body=extra,
    )
    pieces, applied = [], set()
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        named = (chunk.model_extra or {}).get("adapter")
        applied.add(named["id"] if named else None)
    assert applied == {adapter}
    return "".join(pieces)


async def streams_together_and_alone(url: str, names: list[str]):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=300) as client:
        wanted = [(None, *names)[i % (len(names) + 1)] for i in range(32)]
        base = (await client.models.list()).data[0].id
        asked = [(name, f"Say number {i} in words.") for i, name in enumerate(wanted)]
        together = await asyncio.gather(
            *(stream_text(client, base, name, prompt) for name, prompt in asked)
        )
        alone = [await stream_text(client, base, name, prompt) for name, prompt in asked]
    return together, alone


def test_32_streams_of_the_openai_client_equal_the_same_requests_alone(server, tiny_adapters):
    names = list(tiny_adapters)[:8]
    together, alone = asyncio.run(streams_together_and_alone(server.url, names))
    assert together == alone
    assert len(set(together)) > 16


def test_an_uploaded_adapter_is_used_without_a_restart_and_deleted_for_good(server, tiny_adapters):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(tiny_adapters["rank-pattern"], arcname="mine")
    upload = server.http.post(
        "/v1/adapters", data={"adapter_id": "mine"}, files={"archive": buffer.getvalue()}
    )
    assert upload.status_code == 201, upload.text
    body = {"model": "mine", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.headers["x-manylora-adapter-digest"] == upload.json()["digest"]
    state = server.http.get("/v1/adapters/mine").json()
    assert state["id"] == "mine"
    deleted = server.http.delete("/v1/adapters/mine")
    assert deleted.status_code == 200
    assert deleted.json()["freed_bytes"] > 0
    assert server.http.post("/v1/completions", json=body).status_code == 404


def test_deleting_one_of_two_names_of_the_same_weights_ends_only_its_own_requests(
    server, tiny_adapters
):
    files = {
        "config": (tiny_adapters["rank-8"] / "adapter_config.json").read_bytes(),
        "weights": (tiny_adapters["rank-8"] / "adapter_model.safetensors").read_bytes(),
    }
    for name in ("twin-a", "twin-b"):
        answer = server.http.post("/v1/adapters", data={"adapter_id": name}, files=files)
        assert answer.status_code == 201, answer.text
    body = {"model": "twin-a", "prompt": "tell", "max_tokens": 480, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        deleted = server.http.delete("/v1/adapters/twin-a?mode=abort")
        assert deleted.json()["freed_bytes"] == 0
        rest = [line for line in lines if line]
    assert '"request_cancelled"' in rest[-2]
    answer = server.http.post(
        "/v1/completions", json={"model": "twin-b", "prompt": "tell", "max_tokens": 2}
    )
    assert answer.status_code == 200


def test_a_killed_engine_ends_its_requests_with_an_error_and_comes_back(server):
    body = {"prompt": "tell me", "max_tokens": 400, "stream": True, "ignore_eos": True}
    names = server.names()
    with server.http.stream("POST", "/v1/completions", json={"model": names[1], **body}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(server.engine_pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-2]
    assert "engine" in rest[-2]
    wait_until_ready(server)
    assert server.names() == names
    answer = server.http.post(
        "/v1/completions", json={"model": names[1], "prompt": "x", "max_tokens": 2}
    )
    assert answer.status_code == 200


def wait_until_ready(server: RunningServer) -> None:
    """Ask until the server says that it is able to serve; it always ends, by itself or by 503."""
    with httpx.Client(
        base_url=server.url, transport=httpx.HTTPTransport(retries=3), timeout=START_SECONDS
    ) as client:
        while client.get("/ready").status_code != 200:
            assert server.process.poll() is None, "the server ended"
            os.sched_yield()


def test_a_killed_server_has_all_its_adapters_after_a_restart(
    model_with_tokenizer, tiny_adapters, tmp_path
):
    flags = ("--dtype", "float32")
    with running_server(model_with_tokenizer, tmp_path, *flags) as first:
        for name in ("rank-8", "regex"):
            files = {
                "config": (tiny_adapters[name] / "adapter_config.json").read_bytes(),
                "weights": (tiny_adapters[name] / "adapter_model.safetensors").read_bytes(),
            }
            answer = first.http.post("/v1/adapters", data={"adapter_id": name}, files=files)
            assert answer.status_code == 201, answer.text
        engine_pid = first.engine_pid
        first.process.kill()
        first.process.wait()
    psutil.wait_procs([p for p in psutil.process_iter() if p.pid == engine_pid], timeout=30)
    assert not psutil.pid_exists(engine_pid), "the engine outlived its server"
    with running_server(model_with_tokenizer, tmp_path, *flags) as second:
        assert {"rank-8", "regex"} < set(second.names())
        body = {"model": "regex", "prompt": "hello", "max_tokens": 4}
        assert second.http.post("/v1/completions", json=body).status_code == 200


@pytest.mark.slow
def test_32_streams_over_the_default_model_equal_the_same_requests_alone(
    adapter_maker, oracle_class, tmp_path, recipes
):
    from transformers import AutoModelForCausalLM, GgufConfig

    from server.model.source import resolve_source

    path = resolve_source("embedded").path
    config = GgufConfig(gguf_file=path.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", quantization_config=config
    )
    names = list(recipes)[:8]
    adapters = {
        name: adapter_maker(model, tmp_path / name, seed, 0.03, **recipes[name])
        for seed, name in enumerate(names)
    }
    flags = ["--dtype", "float32", "--pool-bytes", str(1 << 30), *adapter_flags(adapters)]
    with running_server("embedded", tmp_path / "data", "--no-shipped-adapters", *flags) as server:
        together, alone = asyncio.run(streams_together_and_alone(server.url, names))
    assert together == alone
    assert len(set(together)) > 16
