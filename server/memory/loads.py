"""The loads in progress: who still wants them, which take too long, and how they ended.

Knows digests and pages by number; the copying is the loader's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from server.memory.image_loader import LoadCancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.memory.image_file import ImageError, RankTable
    from server.memory.image_loader import ImageLoader
    from server.memory.residency import AdapterImage


@dataclass(slots=True)
class _Load:
    """One load that its loader has not ended; changed only by Loads."""

    image: AdapterImage
    pages: list[int]
    is_preload: bool  # wanted by who asked for it, whatever requests do
    deadline: float
    is_cancelled: bool = False  # and not wanted again since
    is_overdue: bool = False  # those that waited were told; others are told when they come


class Loads:
    """Each digest loads once at a time: wanted → cancelled → wanted again …, until it ends.

    Invariant: the pages of a load are its own until `take_ended` names it, since a thread may
    write them until then. A load that takes longer than the timeout is overdue: it is cancelled
    and its requests are told, but it ends when its thread lets go of it, and not before.
    """

    def __init__(
        self,
        loader: ImageLoader,
        *,
        timeout_seconds: float,
        on_ended: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_ended` is called from the loader's thread at each end, for `take_ended` to take."""
        self.num_cancelled = 0  # loads that ended because nobody wanted them
        self._loader = loader
        self._timeout_seconds = timeout_seconds
        self._on_ended = on_ended
        self._clock = clock
        self._loads: dict[str, _Load] = {}
        self._ended: SimpleQueue[tuple[str, RankTable | ImageError]] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, digest: object) -> bool:
        return digest in self._loads

    def start(self, image: AdapterImage, pages: list[int], *, is_preload: bool) -> None:
        """Begin to copy `image` to `pages`; the digest is not loading."""
        assert image.digest not in self._loads, "a digest is loaded once at a time"
        load = _Load(image, pages, is_preload, self._clock() + self._timeout_seconds)
        self._loads[image.digest] = load
        self._begin(load)

    def join(self, digest: str, *, is_preload: bool) -> str | None:
        """One more wants a load in progress; what to tell it when that load is overdue.

        One that was cancelled is begun anew once the loader has let go of it.
        """
        load = self._loads[digest]
        if load.is_overdue:
            return self._lateness(load)
        load.is_cancelled = False
        load.is_preload |= is_preload
        return None

    def cancel(self, digest: str) -> None:
        """No request waits for it any more. A preload goes on, and so does what is not loading."""
        load = self._loads.get(digest)
        if load is not None and not load.is_preload:
            load.is_cancelled = True
            self._loader.cancel(digest)

    def take_ended(self) -> list[tuple[str, RankTable | ImageError | None]]:
        """The loads whose pages are written no more: their tables, or why there is none.

        None stands for a load that ended because it was cancelled or overdue: there is nobody to
        be told of it now.
        """
        ended: list[tuple[str, RankTable | ImageError | None]] = []
        while True:
            try:
                digest, outcome = self._ended.get_nowait()
            except Empty:
                return ended
            load = self._loads[digest]
            is_given_up = load.is_cancelled or load.is_overdue
            if isinstance(outcome, LoadCancelled) and not is_given_up:
                load.deadline = self._clock() + self._timeout_seconds
                self._begin(load)
                continue
            del self._loads[digest]
            if isinstance(outcome, Exception) and is_given_up:
                self.num_cancelled += not load.is_overdue
                ended.append((digest, None))
            else:
                ended.append((digest, outcome))

    def take_overdue(self) -> list[tuple[str, str]]:
        """The loads that have become overdue, each once, with what to tell those that wait."""
        now = self._clock()
        late = [x for x in self._loads.values() if now >= x.deadline and not x.is_overdue]
        for load in late:
            load.is_overdue = True
            self._loader.cancel(load.image.digest)
        return [(load.image.digest, self._lateness(load)) for load in late]

    def check(self, pages_of: dict[str, list[int]]) -> None:
        """The adapters that load are these, with these pages; AssertionError if they are not."""
        assert {digest: load.pages for digest, load in self._loads.items()} == pages_of

    def _begin(self, load: _Load) -> None:
        digest = load.image.digest

        def finish(outcome: RankTable | ImageError) -> None:
            self._ended.put((digest, outcome))
            self._on_ended()

        self._loader.start(load.image, load.pages, finish)

    def _lateness(self, load: _Load) -> str:
        return (
            f"adapter {load.image.digest}: its load takes longer than {self._timeout_seconds:g} s: "
            "try again later; the operator may look at the disk, or raise load_timeout_seconds"
        )
