"""The client reads answers in any split, and takes no answer for another."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from bench.http_client import HttpClient
from bench.replay import RequestFailed

READY = b'{"status": "ready", "model": "base-model"}'


def event(**content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def text(piece):
    return event(choices=[{"text": piece, "finish_reason": None}])


END = event(choices=[], usage={"completion_tokens": 3, "prompt_tokens": 2}) + b"data: [DONE]\n\n"


def plain(body, status="200 OK"):
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


def stream(content, size, adapter=None):
    """Chunks of `size` bytes, in no relation to the events."""
    head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    head += f"X-Manylora-Adapter: {adapter}\r\n" if adapter else ""
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    framed = [f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks]
    return [(head + "\r\n").encode(), *framed, b"0\r\n\r\n"]


@asynccontextmanager
async def serving(*answers):
    """A server that gives each connection the next answer; yields a client and what was sent."""
    waiting, received = list(answers), []

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        received.append((head.split(b"\r\n")[0].decode(), await reader.readexactly(length)))
        for part in waiting.pop(0):
            writer.write(part)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield HttpClient(f"http://127.0.0.1:{port}"), received


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_is_read_in_whatever_chunks_it_comes(size):
    async def main():
        content = text("a") + text("") + text("bc") + END
        async with serving(stream(content, size, adapter="x")) as (client, received):
            marks = []
            answer = await client.complete([5, 6], "x", 3, lambda: marks.append(1))
            return answer, len(marks), received

    answer, num_marks, received = asyncio.run(main())
    assert answer == (3, "abc")
    assert num_marks == 2  # a chunk without text is no piece
    ((line, sent),) = received
    assert line == "POST /v1/completions HTTP/1.1"
    assert json.loads(sent) == {
        "model": "x",
        "prompt": [5, 6],
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_base_model_is_asked_by_its_own_name_which_is_asked_for_once():
    async def main():
        answers = [plain(READY), stream(text("a") + END, 50), stream(text("b") + END, 50)]
        async with serving(*answers) as (client, received):
            await client.complete([1], None, 3)
            await client.complete([1], None, 3)
            return received

    ready, *sent = asyncio.run(main())
    assert ready[0] == "GET /ready HTTP/1.1"
    assert [json.loads(body)["model"] for _, body in sent] == ["base-model", "base-model"]


def test_an_answer_without_text_has_one_piece():
    async def main():
        async with serving(stream(END, 50, adapter="x")) as (client, _):
            marks = []
            await client.complete([1], "x", 3, lambda: marks.append(1))
            return marks

    assert asyncio.run(main()) == [1]


@pytest.mark.parametrize("answered_by", [None, "y"])
def test_another_adapters_answer_is_no_answer(answered_by):
    async def main():
        async with serving(stream(text("a") + END, 50, adapter=answered_by)) as (client, _):
            await client.complete([1], "x", 3)

    with pytest.raises(RuntimeError, match="is the answer for x"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (plain(b'{"error": {"message": "busy"}}', "503 Service Unavailable"), "503.*busy"),
        (stream(text("a") + event(error={"message": "lost"}), 50, adapter="x"), "lost"),
        (stream(text("a"), 50, adapter="x"), "without its usage"),
        (stream(text("a") + END, 50, adapter="x")[:2], "IncompleteRead"),
        ([b""], "IncompleteRead"),
    ],
)
def test_a_refused_or_broken_answer_fails_its_request(answer, told):
    async def main():
        async with serving(answer) as (client, _):
            await client.complete([1], "x", 3)

    with pytest.raises(RequestFailed, match=told):
        asyncio.run(main())


def test_metrics_without_labels_are_read_by_name():
    exposition = b'# HELP a b\n# TYPE a counter\na_total 3.0\nb{c="d"} 4.0\ne 5.0\n'

    async def main():
        async with serving(plain(exposition)) as (client, _):
            return await client.metrics()

    assert asyncio.run(main()) == {"a_total": 3.0, "e": 5.0}


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"'127\.0\.0\.1:8000' is not an address such as"):
        HttpClient("127.0.0.1:8000")
