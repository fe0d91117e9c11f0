"""Stop strings: end a text before the first that occurs, across any split into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string is complete; the stop string itself is not passed on.

    What is passed on does not depend on how the text is split: the stop string that is complete
    first ends it (of several that end at the same character, the longest). Text that may be the
    beginning of a stop string is held back. `matched` is the stop string that ended the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain now; "" for ever after a match."""
        if self.matched is not None or not self._stops:
            return "" if self._stops else text
        self._held += text
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if matches:
            _, start, self.matched = min(matches)
            passed, self._held = self._held[:start], ""
            return passed
        keep = self._num_undecided()
        passed, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return passed

    def flush(self) -> str:
        """What is held back, once the text has ended without a stop string."""
        passed, self._held = self._held, ""
        return passed

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
