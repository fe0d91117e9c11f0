"""An event loop whose sleeps take no time, for what waits and measures."""

from __future__ import annotations

import asyncio
import selectors

import pytest


class _NoWaiting(selectors.DefaultSelector):
    """Instead of waiting, moves the clock of its loop."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "nothing is scheduled: the test would wait for ever"
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time is what its tasks have slept; `pause` lets it pass without them."""

    def __init__(self):
        self._virtual = _NoWaiting()
        super().__init__(self._virtual)

    def time(self):
        return self._virtual.now

    def pause(self, until):
        self._virtual.now = until


@pytest.fixture
def virtual_run():
    """Runs a coroutine in virtual time; its result."""

    def run(coroutine):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(coroutine)

    return run
