"""What messages say of adapters on the device: the image to load, the state that it is in.

Stands below the messages of `server.engine.request`, which offers both names on.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class AdapterImage(msgspec.Struct, frozen=True):
    """An adapter version as the engine knows it: no name, only content."""

    digest: str  # sha256 hex of the adapter's canonical content
    path: str  # packed image for the running base layout


class ResidentAdapter(msgspec.Struct, frozen=True):
    """One adapter in the engine's report."""

    digest: str
    state: Literal["loading", "resident"]
    num_pages: int
    num_users: int  # running sequences
    num_uses: int  # sequences since it was loaded
