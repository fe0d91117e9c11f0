"""The engine process: builds the engine, says Started, turns its loop until it is told to end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING

import torch

from kernels.layout import AdapterIndex, AttentionIndex
from kernels.ops import kernels_for
from server.engine.graphs import CudaCapture, DecodeGraphs, GraphLimits
from server.engine.loop import EngineLoop
from server.engine.mailbox import Mailbox
from server.engine.request import Refused, Settled, Started
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.spec import EngineSpec, engine_spec
from server.memory.adapter_pool import AdapterPool
from server.memory.image_loader import ThreadedImageLoader
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool
from server.model.config import ModelError
from server.model.decoder import Decoder, StepInput
from server.model.weights import load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.config import Settings
    from server.engine.graphs import Capture

MAX_SPAN_TARGETS = 3
"""Most targets that share their input: q, k and v."""


def run_engine(settings: Settings, address: str) -> None:
    """Serve the API process that listens on `address` until SIGTERM, or until it is gone.

    Says Settled and then Started; or Refused, at a fault for which the user has a remedy.
    """
    logging.basicConfig(level=logging.INFO, format="engine: %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    mailbox = Mailbox(address)
    try:
        spec = engine_spec(settings)
        mailbox.send([settled(spec)])
        loop, started = build_engine(spec, mailbox)
    except ModelError as error:
        mailbox.send([Refused(error=str(error))])
        _repeat_until_orphaned(lambda: mailbox.receive(wait=True))  # the API process ends this one
        return
    mailbox.send([started])
    try:
        _repeat_until_orphaned(loop.turn)
    finally:
        loop.close()
        mailbox.close()


def settled(spec: EngineSpec) -> Settled:
    """What the API process has to know of the spec; ModelError for a pool that is too small."""
    return Settled(
        model_name=spec.source.name,
        model_path=str(spec.source.path),
        eos_token_ids=spec.config.eos_token_ids,
        device=spec.device,
        dtype=spec.dtype,
        max_context=spec.max_context,
        num_pages=None if spec.pool_bytes is None else spec.num_pages(),
        layout=spec.layout,
    )


def _repeat_until_orphaned(act: Callable[[], object]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "the engine is a process of its own"
    while os.getppid() == parent.pid:
        act()


def build_engine(spec: EngineSpec, mailbox: Mailbox) -> tuple[EngineLoop, Started]:
    """Load the model, take the memory, compile what runs; ModelError for what cannot be served."""
    device, dtype = torch.device(spec.device), spec.torch_dtype
    config, weights = load_model(spec.source, dtype, _show_progress)
    decoder = Decoder(config, weights, kernels_for(spec.device), device, dtype, int8=spec.int8)
    pool = PagePool(spec.num_pages(), spec.geometry.page_elements, dtype, device)
    kv_pool, adapter_pool = divide(pool, spec.adapter_memory_share)
    kv_cache = KVCache(
        kv_pool,
        spec.geometry.block_size,
        prefix_cache=spec.prefix_cache,
        page_seconds=spec.compute_seconds,
    )
    adapters = AdapterPool(
        adapter_pool,
        spec.max_adapters,
        spec.max_rows,
        spec.layout,
        loader=ThreadedImageLoader(pool.storage, spec.layout, spec.loads),
        load_timeout_seconds=spec.loads.timeout_seconds,
        page_seconds=spec.load_seconds,
        on_loaded=mailbox.wake,
    )
    warm_up(decoder, kv_pool, adapters, spec.geometry.block_size)
    capture = capture_for(spec)
    graphs = None
    if capture is not None:
        graphs = capture_graphs(capture, spec, decoder, kv_pool, kv_cache, adapters)
    max_context = _max_context(spec, kv_pool)
    scheduler = Scheduler(
        kv_cache,
        adapters,
        max_num_seqs=spec.max_num_seqs,
        max_batched_tokens=spec.max_batched_tokens,
        max_context=max_context,
        attention_context=spec.attention_context,
        max_passes=spec.max_passes,
        queue_limits=spec.queue_limits,
    )
    runner = Runner(decoder, pool, kv_cache, adapters, graphs)
    started = Started(
        num_pages=sum(part.num_pages for part in {kv_pool, adapter_pool}),
        page_bytes=pool.page_bytes,
        num_slots=spec.max_adapters,
        max_context=max_context,
    )
    return EngineLoop(scheduler, runner, kv_cache, adapters, mailbox), started


def divide(pool: PagePool, adapter_share: float | None) -> tuple[PagePool, PagePool]:
    """The pools of KV cache and adapters: one and the same, unless adapters have a share of it.

    Raises ModelError where the pool has too few pages for two.
    """
    if adapter_share is None:
        return pool, pool
    num_adapter_pages = round(adapter_share * pool.num_pages)
    if not 0 < num_adapter_pages < pool.num_pages:
        raise ModelError(
            f"adapter_memory_share {adapter_share} of {pool.num_pages} pages leaves one side "
            "without a page: make the pool larger (pool_bytes), or leave the share out"
        )
    return pool.split(pool.num_pages - num_adapter_pages)


def capture_for(spec: EngineSpec) -> Capture | None:
    """What captures decode steps; None where every step is launched as it comes."""
    if spec.device == "cuda" and spec.cuda_graphs:
        return CudaCapture(torch.device(spec.device))
    return None


def capture_graphs(
    capture: Capture,
    spec: EngineSpec,
    decoder: Decoder,
    pool: PagePool,
    kv_cache: KVCache,
    adapters: AdapterPool,
) -> DecodeGraphs:
    """Capture decode steps up to the limits of the spec; takes a page out of the pool."""
    scratch_page = pool.set_aside()
    limits = GraphLimits(
        max_num_seqs=spec.max_num_seqs,
        max_context=_max_context(spec, pool),
        max_span_rows=MAX_SPAN_TARGETS * spec.max_adapter_rank,
    )
    return DecodeGraphs(
        decoder, kv_cache, adapters, pool.storage, scratch_page, limits, capture, _show_progress
    )


def _max_context(spec: EngineSpec, pool: PagePool) -> int:
    return min(spec.max_context, pool.num_pages * spec.geometry.block_size)


def warm_up(decoder: Decoder, pool: PagePool, adapters: AdapterPool, block_size: int) -> None:
    """Run every kernel once, so that the first request finds them compiled.

    One prompt of two tokens, and one decode, which writes the same key again as the prompt's first
    token; with a slot that has no rank rows.
    """
    _show_progress("kernels", 0, 1)
    pages = pool.allocate(-(-2 // block_size))

    def tensor(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=pool.storage.device)

    attention = AttentionIndex(
        query_start=tensor([0, 2, 3]),
        context_len=tensor([2, 1]),
        block_table=tensor([*pages, *pages]).view(2, -1),
        decode=tensor([1]),
        prefill=tensor([0]),
        max_query=2,
        max_context=2,
    )
    index = AdapterIndex(
        token_slot=tensor([-1, -1, 0]),
        segment_start=tensor([2, 3]),
        segment_slot=tensor([0]),
        num_base=2,
        max_segment=1,
        max_span_rows=1,
    )
    slots = [pages[i // block_size] * block_size + i % block_size for i in (0, 1, 0)]
    decoder.forward(
        StepInput(
            token_ids=tensor([0, 0, 0], torch.int64),
            positions=tensor([0, 1, 0]),
            kv_slot=tensor(slots, torch.int64),
            logit_rows=tensor([1, 2], torch.int64),
            attention=attention,
            adapters=index,
            rows=adapters.rows,
            storage=pool.storage,
        )
    )
    pool.free(pages)
    _show_progress("kernels", 1, 1)


def _show_progress(stage: str, done: int, total: int) -> None:
    """A line at the beginning, at every quarter and at the end of a stage."""
    if done == 0 or done == total or done * 4 // total > (done - 1) * 4 // total:
        sys.stderr.write(f"engine: {stage} {100 * done // max(total, 1)} %\n")
        sys.stderr.flush()
