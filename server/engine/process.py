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
from server.engine.loop import EngineLoop
from server.engine.mailbox import Mailbox
from server.engine.request import Started
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.memory.adapter_pool import AdapterPool
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool
from server.model.config import ModelError
from server.model.decoder import Decoder, StepInput
from server.model.weights import load_model

if TYPE_CHECKING:
    from server.engine.spec import EngineSpec


def run_engine(spec: EngineSpec, address: str) -> None:
    """Serve the API process that listens on `address` until SIGTERM, or until it is gone."""
    logging.basicConfig(level=logging.INFO, format="engine: %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the API decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    parent = multiprocessing.parent_process()
    assert parent is not None, "the engine is a process of its own"
    mailbox = Mailbox(address)
    try:
        loop, started = build_engine(spec, mailbox)
    except ModelError as error:
        sys.exit(f"manylora: {error}")
    mailbox.send([started])
    try:
        while os.getppid() == parent.pid:
            loop.turn()
    finally:
        loop.close()
        mailbox.close()


def build_engine(spec: EngineSpec, mailbox: Mailbox) -> tuple[EngineLoop, Started]:
    """Load the model, take the memory, compile what runs; ModelError for what cannot be served."""
    device, dtype = torch.device(spec.device), spec.torch_dtype
    config, weights = load_model(spec.source, dtype, _show_progress)
    decoder = Decoder(config, weights, kernels_for(spec.device), device, dtype)
    num_pages = spec.num_pages()
    pool = PagePool(num_pages, spec.geometry.page_elements, dtype, device)
    kv_cache = KVCache(pool, spec.geometry.block_size)
    adapters = AdapterPool(
        pool, spec.max_adapters, spec.max_rows, spec.layout, on_loaded=mailbox.wake
    )
    warm_up(decoder, pool, adapters, spec.geometry.block_size)
    max_context = min(spec.max_context, num_pages * spec.geometry.block_size)
    scheduler = Scheduler(
        kv_cache,
        adapters,
        max_num_seqs=spec.max_num_seqs,
        max_batched_tokens=spec.max_batched_tokens,
        max_context=max_context,
    )
    runner = Runner(decoder, pool, kv_cache, adapters)
    started = Started(
        num_pages=num_pages,
        page_bytes=pool.page_bytes,
        num_slots=spec.max_adapters,
        max_context=max_context,
    )
    return EngineLoop(scheduler, runner, kv_cache, adapters, mailbox), started


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
