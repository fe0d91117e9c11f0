"""A real engine process: it answers, is cancelled, dies and comes back, and never outlives us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import torch
import transformers

from server.config import Settings
from server.engine.client import EngineClient, EngineStartError
from server.engine.process import settled
from server.engine.request import AdapterImage, Finished, Sampling, Submit, TokenEvent
from server.engine.spec import engine_spec

START_SECONDS, ANSWER_SECONDS = 120, 30

OWNER = """
import asyncio, pickle, sys
from pathlib import Path
from server.engine.client import EngineClient

async def main(settings):
    serving, starting = EngineClient(settings), EngineClient(settings)
    await serving.start()
    starting.spawn()
    print(serving.pid, starting.pid, flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main(pickle.loads(Path(sys.argv[1]).read_bytes())))
"""
"""A process that owns two engines, one of them not ready yet, until somebody kills it."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more by waiting for a second thread than it gives them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the engine processes
        yield


@pytest.fixture(scope="module")
def settings(tiny_llama) -> Settings:
    return Settings(
        model=str(tiny_llama),
        device="cpu",
        dtype="float32",
        pool_bytes=1 << 20,
        max_adapters=2,
        max_num_seqs=4,
    )


@pytest.fixture(scope="module")
def served(settings) -> Iterator[SimpleNamespace]:
    """One started client, and `run` for what happens on its event loop."""
    with asyncio.Runner() as runner:

        def run(coroutine: Coroutine[Any, Any, Any], seconds: float = ANSWER_SECONDS) -> Any:
            async def bounded() -> Any:
                return await asyncio.wait_for(coroutine, seconds)

            return runner.run(bounded())

        async def create() -> EngineClient:
            return EngineClient(settings)

        client = run(create())
        run(client.start(), START_SECONDS)
        yield SimpleNamespace(client=client, run=run)
        run(client.stop())


def submit(request_id: str, max_tokens: int = 8, prompt=(5, 6, 7), **sampling) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=Sampling(**{"max_tokens": max_tokens, "temperature": 0.0, **sampling}),
    )


async def collect(client: EngineClient, request: Submit) -> tuple[list[int], Finished]:
    """All tokens and the one end, which comes last."""
    events = [event async for event in client.generate(request)]
    assert [isinstance(event, Finished) for event in events] == [False] * (len(events) - 1) + [True]
    assert {event.request_id for event in events} == {request.request_id}
    tokens = [t for event in events if isinstance(event, TokenEvent) for t in event.token_ids]
    return tokens, events[-1]


async def first_token(client: EngineClient, request: Submit):
    """A request that has begun: its events so far are one token."""
    events = client.generate(request)
    assert isinstance(await anext(events), TokenEvent)
    return events


async def until_served(client: EngineClient, request: Submit) -> list[int]:
    """Ask again and again, as a caller that is told 503 does."""
    while True:
        tokens, end = await collect(client, request)
        if end.reason == "length":
            return tokens
        assert end.error_code == "engine_lost"
        await asyncio.sleep(0.05)


async def until_idle(client: EngineClient) -> None:
    while client.load is None or client.load.num_running + client.load.num_waiting > 0:
        await asyncio.sleep(0.02)


def test_says_what_it_will_be_and_what_it_can_hold(served, settings):
    spec, started = engine_spec(settings), served.client.started
    assert served.run(served.client.settle()) == settled(spec)
    assert served.client.settled.layout == spec.layout
    assert (started.num_pages, started.page_bytes) == (spec.num_pages(), spec.page_bytes)
    assert (started.num_slots, started.max_context) == (2, 128)


def test_greedy_tokens_are_those_of_transformers(served, tiny_llama):
    tokens, end = served.run(collect(served.client, submit("greedy", 12)))
    assert (end.reason, end.num_prompt_tokens, end.num_completion_tokens) == ("length", 3, 12)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 6, 7, *tokens]])).logits[0, 2:-1]
    assert tokens == logits.argmax(dim=-1).tolist()


def test_requests_at_once_are_answered_as_alone(served):
    requests = [submit(f"r{n}", 6 + n, prompt=range(1, 4 + 5 * n)) for n in range(6)]

    async def together() -> list[tuple[list[int], Finished]]:
        return await asyncio.gather(*(collect(served.client, request) for request in requests))

    answers = served.run(together())
    for request, (tokens, _) in zip(requests, answers, strict=True):
        assert served.run(collect(served.client, request))[0] == tokens
        assert len(tokens) == request.sampling.max_tokens


def test_closing_a_stream_frees_its_place(served):
    async def close_early() -> None:
        # As many as can run at once: the request behind them needs a place of theirs.
        streams = [await first_token(served.client, submit(f"c{n}", 120)) for n in range(4)]
        for stream in streams:
            await stream.aclose()
        await collect(served.client, submit("next"))
        await until_idle(served.client)
        assert served.client.load.num_kv_pages == 0

    served.run(close_early())


def test_an_id_that_is_live_is_refused_and_its_request_goes_on(served):
    async def twice() -> tuple[list[int], Finished]:
        stream = await first_token(served.client, submit("same", 20))
        with pytest.raises(ValueError, match="same is live already: give each its own id"):
            await anext(served.client.generate(submit("same")))
        return [event async for event in stream][-1]

    assert served.run(twice()).reason == "length"


def test_an_adapter_whose_image_is_gone_ends_its_request_and_no_other(served):
    image = AdapterImage(digest="gone", path="/nonexistent/image")
    request = submit("lost")
    broken = Submit(
        request_id="gone",
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        adapter=image,
    )

    async def both():
        return await asyncio.gather(collect(served.client, broken), collect(served.client, request))

    (none, failed), (tokens, end) = served.run(both())
    assert (none, failed.error_code) == ([], "adapter_load_failed")
    assert (len(tokens), end.reason) == (8, "length")


def test_dropping_what_is_not_resident_is_answered(served):
    assert served.run(served.client.drop("nothing")).freed_bytes == 0


def test_a_killed_engine_ends_open_requests_with_an_error_and_serves_again(served):
    async def kill() -> list[int]:
        client = served.client
        before, pid = await collect(client, submit("before")), client.pid
        streams = [await first_token(client, submit(f"open{n}", 100)) for n in range(3)]
        drop = asyncio.create_task(client.drop("waits"))
        os.kill(pid, signal.SIGKILL)
        for n, stream in enumerate(streams):
            end = [event async for event in stream][-1]
            assert (end.request_id, end.reason) == (f"open{n}", "error")
            assert end.error_code == "engine_lost"
            assert "send the request again" in end.error
        assert (await drop).freed_bytes == 0
        end = (await collect(client, submit("too early")))[1]
        assert (end.reason, end.error_code) == ("error", "engine_lost")
        assert (await client.drop("x")).freed_bytes == 0
        assert await until_served(client, submit("after")) == before[0]
        assert client.pid != pid

    served.run(kill(), START_SECONDS)


def test_what_the_engine_says_last_ends_a_request_only_once(served):
    async def finish_then_kill() -> Finished:
        client = served.client
        stream = await first_token(client, submit("short", 3))
        unread = client._requests["short"]
        while not any(isinstance(event, Finished) for event in unread._queue):
            await asyncio.sleep(0.02)
        client._lose_engine("a test says so")
        ends = [event async for event in stream if isinstance(event, Finished)]
        assert len(ends) == 1
        return ends[0]

    assert served.run(finish_then_kill()).reason == "length"


async def start_and_stop(settings: Settings) -> None:
    client = EngineClient(settings)
    try:
        await asyncio.wait_for(client.start(), START_SECONDS)
    finally:
        await client.stop()
        assert client.pid is None or not psutil.pid_exists(client.pid)
        assert not client._directory.exists()


def test_an_engine_that_refuses_is_an_error_in_its_words_and_leaves_nothing(settings, tmp_path):
    (tmp_path / "config.json").write_bytes((Path(settings.model) / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    broken = settings.model_copy(update={"model": str(tmp_path)})
    too_small = settings.model_copy(update={"pool_bytes": 100})

    async def both() -> list[BaseException]:
        return await asyncio.gather(
            start_and_stop(broken), start_and_stop(too_small), return_exceptions=True
        )

    without_weights, without_pages = asyncio.run(both())
    assert isinstance(without_weights, EngineStartError)
    assert "model.safetensors is broken" in str(without_weights)
    assert isinstance(without_pages, EngineStartError)
    assert "a pool of 100 bytes holds 0 pages" in str(without_pages)


def test_an_engine_that_dies_at_its_start_is_an_error_with_its_exit_code(settings):
    async def kill() -> None:
        client = EngineClient(settings)
        client.spawn()
        os.kill(client.pid, signal.SIGKILL)
        try:
            for wait in (client.settle, client.start):
                with pytest.raises(EngineStartError, match="exit code -9"):
                    await asyncio.wait_for(wait(), START_SECONDS)
        finally:
            await client.stop()

    asyncio.run(kill())


def test_an_engine_started_again_has_to_be_what_it_was(settings):
    client, killed = EngineClient(settings), []
    client._process = SimpleNamespace(kill=lambda: killed.append(True))
    first = settled(engine_spec(settings))
    client._take(first)
    client._take(first)
    assert (client.settled, killed) == (first, [])
    client._take(msgspec.structs.replace(first, eos_token_ids=(1,)))
    assert (client.settled, killed) == (first, [True])
    assert "has changed since the start: restart the server" in client._refusal
    shutil.rmtree(client._directory)


def test_engines_end_when_their_parent_is_killed_while_they_serve_or_start(settings, tmp_path):
    (tmp_path / "owner.py").write_text(OWNER)
    (tmp_path / "settings.pickle").write_bytes(pickle.dumps(settings))
    owner = subprocess.Popen(
        [sys.executable, tmp_path / "owner.py", tmp_path / "settings.pickle"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with owner, contextlib.ExitStack() as cleanup:
        cleanup.callback(owner.kill)
        engines = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(engines) == 2
        for engine in engines:
            cleanup.callback(kill_quietly, engine)
        owner.kill()
        _, alive = psutil.wait_procs(engines, timeout=START_SECONDS)
        assert not alive, "an engine outlives its parent"


def kill_quietly(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
