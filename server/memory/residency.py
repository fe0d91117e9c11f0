"""What messages say of adapters on the device: the image to load, the state that it is in.

Stands below the messages of `server.engine.request`, which offers these names on.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

COMBINATION = "mix:"
"""How the digest of a combination begins; no adapter's does."""


class AdapterPart(msgspec.Struct, frozen=True):
    """A member of a combination; the weight multiplies the scales of its rank rows."""

    image: AdapterImage
    weight: float  # finite, not 0


class AdapterImage(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter version as the engine knows it: no name, only content.

    One with parts is a combination, by `combination` alone: it has no file of its own.
    """

    digest: str  # sha256 hex of the adapter's canonical content; see `combination`
    path: str = ""  # packed image for the running base layout
    parts: tuple[AdapterPart, ...] = ()  # by digest, each with another one

    @property
    def members(self) -> tuple[AdapterImage, ...]:
        """What has to be resident for a request of it to run: itself, or the parts' images."""
        return tuple(part.image for part in self.parts) if self.parts else (self,)


def combination(parts: Iterable[AdapterPart]) -> AdapterImage:
    """The adapter whose delta is the weighted sum of the parts' deltas, in whatever order.

    Its digest says which content with which weights, to the last bit of each; of one part of
    weight 1 it is that part itself. Parts of weight 0 are not given, nor one content twice.
    """
    ordered = tuple(sorted(parts, key=lambda part: part.image.digest))
    digests = [part.image.digest for part in ordered]
    assert ordered, "a combination of nothing is the base model"
    assert len(set(digests)) == len(digests), "one content is one part"
    if len(ordered) == 1 and ordered[0].weight == 1.0:
        return ordered[0].image
    content = ",".join(f"{part.image.digest}*{float(part.weight).hex()}" for part in ordered)
    return AdapterImage(COMBINATION + sha256(content.encode()).hexdigest(), parts=ordered)


class ResidentAdapter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One adapter in the engine's report: on the device, or in host memory.

    `host`: a load would copy it without a read; an adapter that the report leaves out is on disk.
    """

    digest: str
    state: Literal["host", "loading", "resident"]
    num_pages: int = 0  # of the device's pool
    num_users: int = 0  # running sequences, in combinations too
    num_uses: int = 0  # sequences since it was loaded
    num_host_pages: int = 0  # of its copy in host memory, whatever the state
