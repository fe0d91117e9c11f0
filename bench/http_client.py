"""A lean HTTP/1.1 client for load: a connection for each request, completions as streams.

It shares the machine with the server that it loads, so it does no more than it must.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from bench.replay import RequestFailed

BOUNDARY = "manylora-bench-part"


class _Choice(msgspec.Struct):
    text: str
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose body has not been read; header names are in lower case."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))
            return
        while size := int(await _line(self.reader), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])


class HttpClient:
    """One server's routes; `url` as http://127.0.0.1:8000."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url!r} is not an address such as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, parts.port or 80
        self._base_model: str | None = None
        self._chunk = msgspec.json.Decoder(_Chunk)

    @asynccontextmanager
    async def send(
        self, method: str, path: str, body: bytes = b"", content_type: str = "application/json"
    ) -> AsyncGenerator[Response, None]:
        """The answer to one request, on a connection of its own."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(
                f"{method} {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
                f"connection: close\r\ncontent-type: {content_type}\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            status = int((await _line(reader)).split()[1])
            headers = {}
            while line := await _line(reader):
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            yield Response(status, headers, reader)
        finally:
            writer.close()

    async def get(self, path: str) -> bytes:
        """A body; RuntimeError unless the status is 200."""
        async with self.send("GET", path) as response:
            body = await response.body()
            if response.status != 200:
                raise RuntimeError(f"GET {path} gave {response.status}: {body[:500]!r}")
            return body

    async def base_model(self) -> str:
        """The public name of the base model; asked for once."""
        if self._base_model is None:
            self._base_model = str(json.loads(await self.get("/ready"))["model"])
        return self._base_model

    async def complete(
        self,
        prompt: Sequence[int],
        adapter_id: str | None,
        num_tokens: int,
        arrived: Callable[[], None] = lambda: None,
    ) -> tuple[int, str]:
        """Number of tokens and text of a greedy completion that ignores the end of sequence.

        `arrived` is called when text comes, once for each chunk, and at the end if none came. A
        chunk is a token, or several where one alone is no whole character. Raises RequestFailed
        for an error, RuntimeError if another adapter answers than was asked.
        """
        body = {
            "model": adapter_id or await self.base_model(),
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self.send("POST", "/v1/completions", msgspec.json.encode(body)) as response:
                if response.status != 200:
                    raise RequestFailed(f"{response.status}: {await response.body()!r}")
                if response.headers.get("x-manylora-adapter") != adapter_id:
                    raise RuntimeError(f"{response.headers} is the answer for {adapter_id}")
                return await self._read(response, arrived)
        except (OSError, EOFError) as error:
            raise RequestFailed(repr(error)) from error

    async def _read(self, response: Response, arrived: Callable[[], None]) -> tuple[int, str]:
        texts: list[str] = []
        async with aclosing(_events(response)) as events:
            async for data in events:
                if data == b"[DONE]":
                    break
                chunk = self._chunk.decode(data)
                if chunk.error is not None:
                    raise RequestFailed(str(chunk.error))
                if chunk.choices and chunk.choices[0].text:
                    arrived()
                    texts.append(chunk.choices[0].text)
                if chunk.usage is not None:
                    if not texts:
                        arrived()
                    return chunk.usage.completion_tokens, "".join(texts)
        raise RequestFailed("the stream ended without its usage")

    async def upload(self, adapter_id: str, directory: Path) -> None:
        """Register what PEFT wrote to a directory; RuntimeError if it is refused."""
        parts = [('name="adapter_id"', adapter_id.encode())]
        for field, name in (
            ("config", "adapter_config.json"),
            ("weights", "adapter_model.safetensors"),
        ):
            parts.append((f'name="{field}"; filename="{name}"', (directory / name).read_bytes()))
        body = b"".join(
            f"--{BOUNDARY}\r\ncontent-disposition: form-data; {head}\r\n\r\n".encode()
            + content
            + b"\r\n"
            for head, content in parts
        )
        body += f"--{BOUNDARY}--\r\n".encode()
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        async with self.send("POST", "/v1/adapters", body, kind) as response:
            answer = await response.body()
            if response.status != 201:
                raise RuntimeError(f"{adapter_id} was refused: {answer[:500]!r}")

    async def adapter_ids(self) -> set[str]:
        """Names of the registered adapters."""
        listing = json.loads(await self.get("/v1/adapters"))
        return {entry["id"] for entry in listing["data"]}

    async def metrics(self) -> dict[str, float]:
        """The metrics without labels, by name."""
        lines = (await self.get("/metrics")).decode().splitlines()
        pairs = (line.split(" ") for line in lines if line[:1] not in ("#", ""))
        return {name: float(value) for name, value in pairs if "{" not in name}


async def _line(reader: asyncio.StreamReader) -> bytes:
    """A line without its end; IncompleteReadError where the connection ended before it."""
    return (await reader.readuntil(b"\r\n"))[:-2]


async def _events(response: Response) -> AsyncGenerator[bytes, None]:
    """What follows `data: ` of each server-sent event."""
    rest = b""
    async with aclosing(response.pieces()) as pieces:
        async for piece in pieces:
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                yield event.removeprefix(b"data: ")
