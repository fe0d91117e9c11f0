"""A bound on bytes a second, shared by threads that ask before they move them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

BURST_SECONDS = 0.01
"""Time whose bytes may be moved at once after a pause: threads wake later than they asked for."""


class ByteRate:
    """A token bucket: in any t seconds at most rate · (t + BURST_SECONDS) bytes and one piece."""

    def __init__(
        self, bytes_per_second: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ValueError unless the rate is positive."""
        if not bytes_per_second > 0:
            raise ValueError(f"{bytes_per_second} bytes a second move nothing: give more, or none")
        self._bytes_per_second = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()  # when all bytes that were granted are paid for

    def reserve(self, num_bytes: int) -> float:
        """Take `num_bytes` of what may be moved; the seconds to wait before moving them."""
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now - BURST_SECONDS)
            self._free_at = start + num_bytes / self._bytes_per_second
            return max(0.0, start - now)
