"""The Drops that wait for requests to end before their adapters leave the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.engine.request import Dropped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from server.engine.sequence import Sequence
    from server.memory.adapter_pool import AdapterPool


@dataclass(slots=True)
class _Drain:
    members: set[str] = field(default_factory=set)  # ids of requests that were live at the Drop
    num_answers: int = 0  # Drops of one adapter that wait for the same end


class Drains:
    """Which adapters drain, and for whom; each Drop is answered by exactly one Dropped."""

    def __init__(self) -> None:
        self._drains: dict[str, _Drain] = {}

    def __len__(self) -> int:
        return len(self._drains)

    def begin(self, digest: str, members: Iterable[Sequence]) -> None:
        """Drop `digest` once `members`, the live requests that need it, have ended."""
        drain = self._drains.setdefault(digest, _Drain())
        drain.num_answers += 1
        drain.members.update(sequence.request_id for sequence in members)

    def leave(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        for drain in self._of(sequence):
            drain.members.discard(sequence.request_id)

    def holds_back(self, sequence: Sequence) -> bool:
        """Whether it came after a Drop that still waits for others, of an adapter that it needs."""
        return any(sequence.request_id not in drain.members for drain in self._of(sequence))

    def settle(self, adapters: AdapterPool) -> list[Dropped]:
        """Free the adapters that nobody is waited for any more; the answers.

        Of several Drops of one adapter the first is told the bytes, the others 0.
        """
        answers: list[Dropped] = []
        for digest, drain in list(self._drains.items()):
            num_bytes = None if drain.members else adapters.drop(digest)
            if num_bytes is None:
                continue
            del self._drains[digest]
            freed = [num_bytes] + [0] * (drain.num_answers - 1)
            answers.extend(Dropped(digest=digest, freed_bytes=n) for n in freed)
        return answers

    def _of(self, sequence: Sequence) -> Iterator[_Drain]:
        for digest in sequence.digests if self._drains else ():
            if digest is not None and (drain := self._drains.get(digest)) is not None:
                yield drain
