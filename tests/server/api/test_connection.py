"""A client that goes away frees its place at once; streams end cleanly."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx2
import pytest
import uvicorn
from starlette.requests import ClientDisconnect

from server.api.connection import merged, while_connected


class HandClient:
    """Drives the app by hand, so that it can vanish at any moment."""

    def __init__(self, app, path, body, headers=()):
        self.app = app
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(headers),
        }
        self.body = [{"type": "http.request", "body": body, "more_body": False}]
        self.sent = []
        self.gone = asyncio.Event()
        self.got_text = asyncio.Event()

    async def receive(self):
        if self.body:
            return self.body.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if b'"content":"h' in message.get("body", b""):
            self.got_text.set()

    def start(self):
        return asyncio.ensure_future(self.app(self.scope, self.receive, self.send))


def chat_body(**fields):
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "tiny-base", "messages": messages, **fields}).encode()


def hangs(kit, text, submitted):
    """Says `text`, then waits for ever."""
    plain = kit.says(text)

    def script(request):
        yield from list(plain(request))[:-1]
        submitted.set()
        yield asyncio.Event()

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["", "h"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_has_its_requests_cancelled_at_once(server, kit, stream, text, n):
    async def scenario():
        submitted = asyncio.Event()
        server.engine.script = hangs(kit, text, submitted)
        client = HandClient(
            server.client.app, "/v1/chat/completions", chat_body(stream=stream, n=n)
        )
        running = client.start()
        await asyncio.wait_for(submitted.wait(), 10)
        if stream and text:
            await asyncio.wait_for(client.got_text.wait(), 10)
        assert server.engine.cancelled == []
        client.gone.set()
        await asyncio.wait_for(running, 10)
        return client.sent

    sent = asyncio.run(scenario())
    started = {submit.request_id for submit in server.engine.submits}
    assert set(server.engine.cancelled) == started
    assert len(started) <= n
    assert started
    assert not any(message.get("more_body") is False for message in sent)


def test_over_a_real_socket_a_closed_connection_cancels_the_request(server, kit):
    cancelled = threading.Event()
    plain = kit.says("hello")

    class Watched:
        def __init__(self, engine):
            self.started, self.load, self.engine = engine.started, None, engine

        async def generate(self, request):
            try:
                for event in list(plain(request))[:-1]:
                    yield event
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    app = server.client.app
    app.state.server.engine = Watched(server.engine)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    uvicorn_server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()  # at once: the server does so in its thread, and the client may be quicker
    thread = threading.Thread(target=uvicorn_server.run, args=([socket],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1/chat/completions"
    try:
        with httpx2.stream("POST", url, content=chat_body(stream=True), timeout=10) as response:
            assert response.status_code == 200
            # Kept: a generator that is collected closes the connection.
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert not cancelled.is_set()
        assert cancelled.wait(10)
    finally:
        uvicorn_server.should_exit = True
        thread.join(10)
        socket.close()
    assert not thread.is_alive()


def test_an_upload_that_breaks_off_leaves_no_trace(own_server):
    async def scenario():
        boundary = b'--b\r\ncontent-disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        headers = [(b"content-type", b"multipart/form-data; boundary=b")]
        client = HandClient(own_server.client.app, "/v1/adapters", b"", headers)
        client.body = [{"type": "http.request", "body": boundary + b"x" * 50, "more_body": True}]
        running = client.start()
        client.gone.set()
        await asyncio.wait_for(running, 10)
        return client.sent

    assert asyncio.run(scenario()) == []
    left = [path.name for path in (own_server.data_dir / "tmp").iterdir()]
    assert left == []


def test_an_upload_is_refused_as_soon_as_it_exceeds_the_limit_and_leaves_no_trace(own_server):
    async def scenario():
        part = b'--b\r\ncontent-disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        headers = [(b"content-type", b"multipart/form-data; boundary=b")]
        client = HandClient(own_server.client.app, "/v1/adapters", b"", headers)
        more = {"type": "http.request", "body": b"x" * 10_000, "more_body": True}
        client.body = [{**more, "body": part}, *[more] * 1000]
        await asyncio.wait_for(client.start(), 10)
        return client

    client = asyncio.run(scenario())
    assert client.sent[0]["status"] == 413
    error = json.loads(client.sent[1]["body"])["error"]
    assert error["code"] == "payload_too_large"
    assert "100000 bytes" in error["message"]
    assert len(client.body) == 1000 - 10
    assert list((own_server.data_dir / "tmp").iterdir()) == []


def test_work_that_ends_first_is_the_result_and_its_fault_is_raised():
    async def scenario():
        async def value():
            return 5

        async def fault():
            raise ValueError("x")

        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        assert await while_connected(receive, value()) == 5
        with pytest.raises(ValueError, match="x"):
            await while_connected(receive, fault())
        gone.set()
        with pytest.raises(ClientDisconnect):
            await while_connected(receive, asyncio.Event().wait())

    asyncio.run(scenario())


def test_merged_streams_keep_each_ones_order_and_close_together():
    closed = []

    async def numbers(start):
        try:
            for number in range(start, start + 3):
                await asyncio.sleep(0)
                yield number
            if start == 10:
                await asyncio.Event().wait()
        finally:
            closed.append(start)

    async def scenario():
        stream = merged([numbers(0), numbers(10)])
        seen = [await anext(stream) for _ in range(6)]
        await stream.aclose()
        return seen

    seen = asyncio.run(scenario())
    assert [n for n in seen if n < 10] == [0, 1, 2]
    assert [n for n in seen if n >= 10] == [10, 11, 12]
    assert sorted(closed) == [0, 10]
