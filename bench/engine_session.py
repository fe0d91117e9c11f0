"""An engine process, as the server has one, with random adapters stored for it; without HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import torch

from adapters_store.store import AdapterStore
from bench.random_adapters import write_adapter
from bench.record import peak_bytes
from bench.replay import Ask
from bench.workloads import RandomPrompts
from server.config import Settings
from server.engine.client import EngineClient
from server.engine.request import AdapterImage, Finished, Sampling, Submit, TokenEvent
from server.engine.spec import EngineSpec, engine_spec


class EngineSession:
    """Sends requests of random tokens to one engine, and holds each answer to its adapter."""

    def __init__(self, spec: EngineSpec, engine: EngineClient, start_seconds: float) -> None:
        self.spec = spec
        self.engine = engine
        self.start_seconds = start_seconds
        self._num_sent = 0
        self._prompts = RandomPrompts(spec.config.vocab_size)

    async def answer(
        self,
        prompt: Sequence[int],
        image: AdapterImage | None,
        num_tokens: int,
        arrived: Callable[[], None] = lambda: None,
        num_logprobs: int | None = None,
    ) -> list[TokenEvent]:
        """The events of a greedy answer of num_tokens; `arrived` is called at each.

        Raises RuntimeError if the engine refuses it or another adapter answers.
        """
        self._num_sent += 1
        sampling = Sampling(max_tokens=num_tokens, temperature=0.0, num_logprobs=num_logprobs)
        request = Submit(
            request_id=str(self._num_sent),
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            adapter=image,
            cache_salt=str(self._num_sent),  # what is asked again is computed again
        )
        wanted = image.digest if image else None
        events: list[TokenEvent] = []
        async for event in self.engine.generate(request):
            if isinstance(event, Finished):
                if event.reason != "length":
                    raise RuntimeError(f"a request ended by {event.reason}: {event.error}")
                return events
            if event.adapter_digest != wanted:
                raise RuntimeError(f"{event.adapter_digest} answered for {wanted}")
            arrived()
            events.append(event)
        raise RuntimeError("a request had no final event")

    def asking(
        self,
        texts: Sequence[Sequence[int]],
        images: Sequence[AdapterImage | None],
        num_output: int,
    ) -> Ask:
        """Request i sends the token ids texts[i] to images[i]."""

        async def ask(i: int, arrived: Callable[[], None]) -> int:
            events = await self.answer(texts[i], images[i], num_output, arrived)
            return sum(len(event.token_ids) for event in events)

        return ask

    def prompts(self, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """Random prompts of one length."""
        return self._prompts.draw([num_tokens] * num_prompts)

    async def make_resident(self, images: Sequence[AdapterImage | None]) -> None:
        """Have every adapter loaded, by a request of one token to each."""
        for image in dict.fromkeys(images):
            await self.answer([1], image, 1)

    async def drop_all(self, images: Sequence[AdapterImage | None]) -> None:
        """Free the adapters."""
        for image in dict.fromkeys(images):
            if image is not None:
                await self.engine.drop(image.digest)

    def peak_bytes(self) -> int | None:
        """Most memory that the engine process ever had resident; None where that is not told."""
        return None if self.engine.pid is None else peak_bytes(self.engine.pid)

    def device_bytes(self) -> int | None:
        """Memory of the GPU that is in use now, by this process too; None on a CPU."""
        if self.spec.device != "cuda":
            return None
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


@asynccontextmanager
async def engine_session(settings: Settings) -> AsyncIterator[EngineSession]:
    """Start an engine, and end it afterwards."""
    spec = engine_spec(settings)
    engine = EngineClient(settings)
    began = time.perf_counter()
    try:
        await engine.start()
        yield EngineSession(spec, engine, time.perf_counter() - began)
    finally:
        await engine.stop()


def store_adapters(spec: EngineSpec, ranks: Sequence[int], directory: Path) -> list[AdapterImage]:
    """A random adapter of each rank, admitted by a store under `directory`.

    Adapter i is written to directory/adapter-i, as PEFT would.
    """
    store = AdapterStore(
        directory / "data", spec.layout, max_rank=spec.max_adapter_rank, max_pages=None
    )
    images = []
    with closing(store):
        for i, rank in enumerate(ranks):
            written = write_adapter(directory / f"adapter-{i}", spec.layout, rank, i)
            version = store.add(f"adapter-{i}", written)
            images.append(AdapterImage(version.digest, str(store.image(version))))
    return images
