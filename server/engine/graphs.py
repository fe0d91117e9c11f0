"""Decode steps as CUDA graphs: captured at start for some sizes, replayed with each step's data.

A replay costs the host one call instead of hundreds of launches. Prefill and mixed steps are not
captured: they are few, and long enough to hide their launches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from server.engine.decode_batch import DecodeBatch

if TYPE_CHECKING:
    from torch import Tensor

    from server.engine.scheduler import StepPlan
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache
    from server.model.decoder import Decoder, StepInput

MIN_CONTEXT = 2048
CONTEXT_GROWTH = 4
"""A graph's context bound fixes the width of its block table, and into how many parts attention
is split. Four times what a step needs leaves a quarter of the parts; below MIN_CONTEXT there is
hardly anything to split."""

Replay = Callable[[], None]
"""Does again what was captured, in the same memory, on what lies there now."""


class Capture(Protocol):
    """What makes a Replay of some work on the device: CudaCapture, or a recorder in tests."""

    def __call__(self, work: Callable[[], None]) -> Replay: ...


class CudaCapture:
    """Captures work as CUDA graphs, which share the memory of their intermediate results.

    They may, in any order: no graph's result is read from that memory, and one stream runs them.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Run the work once, so that its kernels are compiled and cuBLAS has its workspace; then
        capture it. No other thread may use the device meanwhile.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
        graph = torch.cuda.CUDAGraph()
        # It waits for the device before it begins.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class GraphLimits(NamedTuple):
    """The largest decode step that is captured."""

    max_num_seqs: int
    max_context: int
    max_span_rows: int  # as in AdapterIndex, of any slot

    def batch_sizes(self) -> list[int]:
        """1, 2, 4, 8, then steps of 8, or of an eighth of the last power of two if that is more.

        A GEMM of few rows is bound by the weights that it reads: up to 8 rows, and up to an
        eighth of more rows, may be padding at no cost that matters. Ends at max_num_seqs.
        """
        sizes, size = [], 1
        while size < self.max_num_seqs:
            sizes.append(size)
            size += size if size < 8 else max(8, (1 << (size.bit_length() - 1)) // 8)
        return [*sizes, self.max_num_seqs]

    def contexts(self) -> list[int]:
        """MIN_CONTEXT, then CONTEXT_GROWTH times the one before. Ends at max_context."""
        contexts, context = [], MIN_CONTEXT
        while context < self.max_context:
            contexts.append(context)
            context *= CONTEXT_GROWTH
        return [*contexts, self.max_context]


class _DecodeGraph(NamedTuple):
    """A batch in its place, and its two replays; both read the same memory."""

    batch: DecodeBatch
    base: Replay  # launches nothing for adapters
    adapters: Replay


class DecodeGraphs:
    """Two graphs, without adapters and with, for each batch size and context of some limits.

    All leave their logits in one tensor, [max_num_seqs, vocab].
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        adapters: AdapterPool,
        storage: Tensor,
        scratch_page: int,
        limits: GraphLimits,
        capture: Capture,
        show_progress: Callable[[str, int, int], None],
    ) -> None:
        """Capture them all, the largest first: the others then find their memory taken already.

        `scratch_page` belongs to no sequence and no adapter, now and later.
        """
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._adapters = adapters
        self._capture = capture
        self._max_span_rows = limits.max_span_rows
        self._batch_sizes, self._contexts = limits.batch_sizes(), limits.contexts()
        self._graphs: dict[tuple[int, int], _DecodeGraph] = {}

        def place(num_rows: int, max_context: int) -> DecodeBatch:
            return DecodeBatch(
                num_rows,
                max_context,
                limits.max_span_rows,
                adapters.rows,
                storage,
                scratch_page,
                kv_cache.block_size,
            )

        sizes = [(n, c) for n in reversed(self._batch_sizes) for c in reversed(self._contexts)]
        self._logits = torch.empty_like(decoder.forward(place(*sizes[0]).step))
        for num_done, size in enumerate(sizes):
            show_progress("graphs", num_done, len(sizes))
            batch = place(*size)
            base = batch.step._replace(adapters=batch.step.adapters._replace(max_segment=0))
            self._graphs[size] = _DecodeGraph(
                batch, self._capture_step(base), self._capture_step(batch.step)
            )
        show_progress("graphs", len(sizes), len(sizes))

    def run(self, plan: StepPlan) -> Tensor | None:
        """Logits [N, vocab] of a plan's N items, in order, valid until the next run.

        None, and nothing is computed, unless each item is one token whose next one is wanted; and
        for an adapter that has more rows than the limits say.
        """
        items = plan.items
        if not all(item.num_tokens == 1 and item.samples for item in items):
            return None
        slots = {item.slot for item in items} - {-1}
        if any(self._adapters.max_span_rows(slot) > self._max_span_rows for slot in slots):
            return None
        num_rows = _smallest(self._batch_sizes, len(items))
        max_context = _smallest(self._contexts, max(item.start for item in items) + 1)
        graph = self._graphs[num_rows, max_context]
        graph.batch.load(items, self._kv_cache)
        replay = graph.adapters if slots else graph.base
        replay()
        return self._logits[: len(items)]

    def _capture_step(self, step: StepInput) -> Replay:
        out = self._logits[: len(step.token_ids)]

        def work() -> None:
            out.copy_(self._decoder.forward(step))

        return self._capture(work)


def _smallest(sizes: list[int], least: int) -> int:
    """The smallest of the sizes, which rise, that is `least` or more; the scheduler asks for no
    more than the largest.
    """
    return sizes[bisect_left(sizes, least)]
