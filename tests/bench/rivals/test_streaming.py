"""The driver reads streamed answers of the three servers, and turns faults into errors."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest

from bench.rivals.environments import RivalError
from bench.rivals.llamacpp import LlamaCpp
from bench.rivals.manylora import MANYLORA
from bench.rivals.streaming import ask_all
from bench.rivals.vllm import Vllm

OPENAI_EVENTS = [
    {"choices": [{"text": "a", "finish_reason": None}]},
    {"choices": [{"text": "b", "finish_reason": None}], "usage": None},
    {"choices": [{"text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": {"completion_tokens": 2}},
]
VLLM_EVENTS = [
    {"choices": [{"text": "a", "token_ids": [5]}]},
    {"choices": [{"text": "", "token_ids": [6]}]},
    {"choices": [], "usage": {"completion_tokens": 2}},
]
LLAMACPP_EVENTS = [
    {"content": "a", "tokens": [5], "stop": False},
    {"content": "", "tokens": [6], "stop": False},
    {"content": "", "tokens": [], "stop": True, "tokens_predicted": 2},
]


@contextmanager
def answering(status, events):
    """A server on a free port that answers every request with the same stream, in chunks."""
    port, stop, started = [0], asyncio.Event(), threading.Event()
    seen = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        seen.append(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for line in [*map(json.dumps, events), "[DONE]"]:
            data = f"data: {line}\n\n".encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        writer.write(b"0\r\n\r\n")
        writer.close()

    async def serve():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port[0] = server.sockets[0].getsockname()[1]
            loops.append(asyncio.get_running_loop())
            started.set()
            await stop.wait()

    loops = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield port[0], seen
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


@pytest.mark.parametrize(
    ("rival", "events", "text"),
    [
        (MANYLORA[0], OPENAI_EVENTS, "ab"),
        (Vllm(), VLLM_EVENTS, "a"),
        (LlamaCpp(), LLAMACPP_EVENTS, "a"),
    ],
    ids=["manylora", "vllm", "llamacpp"],
)
def test_text_count_and_arrivals_of_a_stream(rival, events, text):
    requests = [rival.request([1, index], 2, index) for index in range(5)]
    with answering("200 OK", events) as (port, seen):
        answers = ask_all(port, requests, concurrency=2)
    assert sorted(body["prompt"] for body in seen) == [
        request.body["prompt"] for request in requests
    ]
    for answer in answers:
        assert answer.text == text
        assert answer.trace.num_tokens == 2
        assert len(answer.trace.arrivals) == 2
        assert answer.trace.sent <= answer.trace.arrivals[0] <= answer.trace.arrivals[1]


@pytest.mark.parametrize(
    ("status", "events", "message"),
    [
        ("400 Bad Request", [], "answered HTTP/1.1 400 Bad Request"),
        ("200 OK", [{"error": {"message": "out of memory"}}], "out of memory"),
        ("200 OK", [], "an answer without a token"),
    ],
)
def test_a_fault_of_a_server_is_an_error(status, events, message):
    with answering(status, events) as (port, _), pytest.raises(RivalError, match=message):
        ask_all(port, [MANYLORA[0].request([1], 1, None)], concurrency=1)
