"""The decoder with adapters and pages of its own, without a scheduler or a process around it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.store import AdapterStore
from kernels.ops import kernels_for
from server.engine import batch
from server.engine.plan import PlannedSequence, StepPlan
from server.engine.request import AdapterImage, Sampling, Submit
from server.engine.sequence import Sequence as Generation
from server.engine.spec import EngineSpec
from server.memory.adapter_pool import AdapterPool
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool
from server.model.decoder import Decoder, StepInput
from server.model.weights import load_model


class BareModel:
    """One model and its adapters, all resident; every call begins with an empty KV cache.

    An adapter is named as it was given; None is the base model.
    """

    def __init__(self, spec: EngineSpec, adapters: Mapping[str, Path], directory: Path) -> None:
        """adapters: PEFT directories by name, kept packed under `directory`.

        Raises ModelError or AdapterRefused for what cannot be served, RuntimeError where the pool
        or the slots of the spec are too few for all adapters.
        """
        device, dtype = torch.device(spec.device), spec.torch_dtype
        config, weights = load_model(spec.source, dtype)
        self._decoder = Decoder(
            config, weights, kernels_for(spec.device), device, dtype, int8=spec.int8
        )
        pool = PagePool(spec.num_pages(), spec.geometry.page_elements, dtype, device)
        self._storage = pool.storage
        self._kv_cache = KVCache(pool, spec.geometry.block_size)
        loaded = threading.Semaphore(0)
        self._adapters = AdapterPool(
            pool, spec.max_adapters, spec.max_rows, spec.layout, on_loaded=loaded.release
        )
        self._slots: dict[str | None, int] = {None: -1}
        with closing(self._adapters):  # its loader's thread; what is resident stays
            for name, image in _images(spec, adapters, directory).items():
                self._slots[name] = self._load(name, image, loaded)

    def logits(self, token_ids: Sequence[int], adapter: str | None, first: int) -> Tensor:
        """What the model says of token_ids[first:] before it sees them: fp32 [n - first, vocab].

        Row i is of the token after token_ids[: first + i]; first is at least 1.
        """
        (generation,) = generations = _generations([token_ids])
        step = self._step(generations, adapter)
        rows = torch.arange(first - 1, len(token_ids) - 1, device=self._storage.device)
        logits = self._decoder.forward(step._replace(logit_rows=rows))
        self._kv_cache.free(generation.request_id)
        return logits

    def answers(
        self, prompts: Sequence[Sequence[int]], adapter: str | None, num_tokens: int
    ) -> list[list[int]]:
        """The next num_tokens tokens of every prompt, the likeliest each time, in one batch."""
        generations = _generations(prompts)
        for _ in range(num_tokens):
            logits = self._decoder.forward(self._step(generations, adapter))
            for generation, token in zip(generations, logits.argmax(-1).tolist(), strict=True):
                generation.num_computed = generation.num_tokens
                generation.token_ids.append(token)
        for generation in generations:
            self._kv_cache.free(generation.request_id)
        return [generation.token_ids[generation.num_prompt :] for generation in generations]

    def _load(self, name: str, image: AdapterImage, loaded: threading.Semaphore) -> int:
        if not self._adapters.request(image):
            raise RuntimeError(f"no room for adapter {name}: raise pool_bytes or max_adapters")
        loaded.acquire()
        self._adapters.poll()
        slot = self._adapters.acquire(image.digest)
        if slot is None:
            raise RuntimeError(f"adapter {name} did not load")
        return slot

    def _step(self, generations: Sequence[Generation], adapter: str | None) -> StepInput:
        """All tokens of the generations that are not computed yet."""
        slot, items = self._slots[adapter], []
        for generation in generations:
            self._kv_cache.extend(generation.request_id, generation.num_tokens)
            start = generation.num_computed
            num_new = generation.num_tokens - start
            items.append(PlannedSequence(generation, start, num_new, slot, samples=True))
        return batch.build(StepPlan(tuple(items)), self._kv_cache, self._adapters, self._storage)


def _generations(prompts: Sequence[Sequence[int]]) -> list[Generation]:
    sampling = Sampling(max_tokens=1, temperature=0.0)
    return [
        Generation(Submit(request_id=str(i), prompt_token_ids=tuple(ids), sampling=sampling), i)
        for i, ids in enumerate(prompts)
    ]


def _images(
    spec: EngineSpec, adapters: Mapping[str, Path], directory: Path
) -> dict[str, AdapterImage]:
    """The adapters as the spec's layout packs them, each admitted by a store."""
    store = AdapterStore(directory, spec.layout, max_rank=spec.max_adapter_rank, max_pages=None)
    with closing(store):
        versions = {name: store.add(name, source) for name, source in adapters.items()}
        return {
            name: AdapterImage(version.digest, str(store.image(version)))
            for name, version in versions.items()
        }
