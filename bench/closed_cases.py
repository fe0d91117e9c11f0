"""The cases of the closed loop: whom its clients ask, one run of a case, and its work."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence

from bench.engine_session import EngineSession
from bench.machine_limits import Work
from bench.replay import closed_loop, figures
from server.engine.request import AdapterImage


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Requests take turns through `images`; none of them: the base model."""

    name: str
    ranks: tuple[int, ...]
    images: tuple[AdapterImage, ...]

    def image_of(self, i: int) -> AdapterImage | None:
        """The adapter of request i."""
        return self.images[i % len(self.images)] if self.images else None


def cases(
    options: argparse.Namespace,
    concurrency: int,
    plain: Sequence[AdapterImage],
    mixed: Sequence[AdapterImage],
    mixed_ranks: Sequence[int],
) -> list[Case]:
    """The cases for a number of clients: those in which every adapter gets a request."""
    num_requests = concurrency * options.requests_per_client
    found = [Case("base", (), ())]
    found += [
        Case(f"{n} x r{options.rank}", (options.rank,) * n, tuple(plain[:n]))
        for n in options.adapters
        if n <= num_requests
    ]
    n = min(len(mixed), num_requests)
    return [*found, Case(f"{n} mixed", tuple(mixed_ranks[:n]), tuple(mixed[:n]))]


async def one_batch(
    session: EngineSession, case: Case, concurrency: int, options: argparse.Namespace
) -> dict[str, float]:
    """Every client's requests once; the figures of the run."""
    images = [case.image_of(i) for i in range(concurrency * options.requests_per_client)]
    prompts = session.prompts(len(images), options.prompt)
    ask = session.asking(prompts, images, options.tokens)
    numbers = figures(await closed_loop(len(images), concurrency, ask))
    total = numbers["output_tokens_per_second"] * (1 + options.prompt / options.tokens)
    return numbers | {"total_tokens_per_second": total}


def work_of(case: Case, concurrency: int, options: argparse.Namespace) -> Work:
    """What a case asks of the machine."""
    return Work(
        num_requests=concurrency * options.requests_per_client,
        concurrency=concurrency,
        num_prompt=options.prompt,
        num_output=options.tokens,
        num_adapters=len(case.images),
        mean_rank=statistics.fmean(case.ranks or (0,)),
    )
