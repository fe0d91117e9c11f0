"""The first request of an adapter by where its image lies, and what it does to others' tokens."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bench.engine_session import EngineSession
from bench.long_prompt import beside_streams
from bench.record import percentiles, spread
from bench.stored_images import Fleet, StoredImage, forget_cached
from server.engine.request import AdapterImage
from server.engine.spec import EngineSpec

Tier = Literal["disk", "page cache", "host", "device"]
TIERS: tuple[Tier, ...] = ("disk", "page cache", "host", "device")
"""page cache: the system's, of the file; host: the engine's own copy (host_memory_bytes)."""

STATES = {"disk": None, "page cache": None, "host": "host", "device": "resident"}
"""What the engine's report says of an adapter in each tier; None: nothing."""

REPORT_SECONDS = 0.3
"""After which the engine's report has taken in all that happened."""

HOST_IMAGES = 4
"""Images of the largest rank that host memory holds, so that it evicts none that a round needs."""


def cold_settings(spec: EngineSpec, fleet: Fleet) -> dict[str, int]:
    """Settings of the engine for `cold_starts`: one slot, so that every other load evicts."""
    largest = max(each.num_pages for each in fleet.stored)
    return {"max_adapters": 1, "host_memory_bytes": HOST_IMAGES * largest * spec.page_bytes}


async def cold_starts(
    session: EngineSession, fleet: Fleet, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each rank and tier, over rounds; each round has another adapter of the rank.

    first_token: of a request among decoding streams of the base model. gap: p99 of the seconds
    between two tokens of these streams, quiet and until the request's first token; ratio: of the
    two. The first round warms up. RuntimeError where an adapter is not in its tier.
    """
    found: dict[tuple[int, Tier], list[dict[str, float]]] = {}
    for number in range(-1, options.rounds):
        for rank in options.cold_ranks:
            images = [each.image for each in fleet.stored if each.rank == rank]
            if not images:
                raise ValueError(f"no stored adapter has rank {rank}: add it to --ranks")
            image = images[number % len(images)]
            filler = _another(fleet.stored, image)
            for tier in TIERS:
                await _put(session, tier, image, filler)
                numbers = await _first_request(session, image, options)
                if number >= 0:
                    found.setdefault((rank, tier), []).append(numbers)
    return [
        {
            "rank": rank,
            "tier": tier,
            **{name: spread([numbers[name] for numbers in rounds]) for name in rounds[0]},
        }
        for (rank, tier), rounds in found.items()
    ]


def _another(stored: Sequence[StoredImage], image: AdapterImage) -> AdapterImage:
    """The smallest adapter that is not `image`."""
    others = [each for each in stored if each.image != image]
    return min(others, key=lambda each: each.num_pages).image


async def _first_request(
    session: EngineSession, image: AdapterImage, options: argparse.Namespace
) -> dict[str, float]:
    (prompt,) = session.prompts(1, options.cold_prompt)
    found = await beside_streams(
        session,
        options.streams,
        options.cold_prompt,
        lambda: session.answer(prompt, image, 1),
    )
    quiet, disturbed = (percentiles(gaps, 99)["p99"] for gaps in (found.quiet, found.disturbed))
    return {
        "first_token_seconds": found.seconds,
        "quiet_gap_p99_seconds": quiet,
        "gap_p99_seconds": disturbed,
        "gap_ratio": disturbed / quiet,
    }


async def _put(
    session: EngineSession, tier: Tier, image: AdapterImage, filler: AdapterImage
) -> None:
    """Bring the adapter to where the next request has to find it."""
    await session.engine.drop(image.digest)
    if tier == "disk":
        forget_cached(image)
    elif tier == "page cache":
        Path(image.path).read_bytes()
    else:
        await session.answer([1], image, 1)
        if tier == "host":
            await session.answer([1], filler, 1)
    await asyncio.sleep(REPORT_SECONDS)
    load = session.engine.load
    assert load is not None, "the engine reports when it becomes idle"
    states = {adapter.digest: adapter.state for adapter in load.adapters}
    if states.get(image.digest) != STATES[tier]:
        raise RuntimeError(
            f"adapter {image.digest} should be in tier {tier!r}, and the engine says "
            f"{states.get(image.digest)!r} of it"
        )
