"""The engine's end of the connection to the API process: messages in, batches of messages out."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec
import zmq

from server.engine.request import FromEngine, ToEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

POLL_MILLISECONDS = 1000
"""How long `receive` waits at most, so that the caller can see that its parent is gone."""


class Mailbox:
    """A ZeroMQ pair socket, and a pipe through which another thread can end a wait."""

    def __init__(self, address: str) -> None:
        """Connect to the API process, which listens on `address` (ipc://…)."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.set_hwm(0)
        self._socket.connect(address)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, wait: bool) -> list[ToEngine]:
        """The messages that have come; with `wait`, blocks until one comes, or a wake, or 1 s."""
        if wait:
            ready = dict(self._poller.poll(POLL_MILLISECONDS))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, messages: Sequence[FromEngine]) -> None:
        """Send messages together, in order; never blocks."""
        if messages:
            self._socket.send(self._encoder.encode(messages))

    def wake(self) -> None:
        """End a wait of `receive`; callable from any thread."""
        with contextlib.suppress(BlockingIOError):  # full of wakes that were not read yet
            os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Send what is queued, for at most a second."""
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
