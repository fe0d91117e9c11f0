"""A simulated engine around the scheduler: loads finished by hand, memory that remembers writers.

Each page remembers who wrote what into it, so that a step can tell whether the keys it reads and
the adapter rows it uses are those that it should see.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from server.engine.request import AdapterImage, Dropped, Finished, Sampling, Submit, TokenEvent
from server.engine.scheduler import PlannedSequence, SampledToken, Scheduler, StepPlan
from server.engine.sequence import Status
from server.memory.adapter_pool import AdapterPool
from server.memory.image_loader import ImageError, ImageSize, RankTable
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool

PAGE_ELEMENTS = 16
STOP_TOKEN = 0
VOCAB = 11


def image_of(name: str, num_pages: int) -> AdapterImage:
    """An image that the simulated loader understands: its path is its number of pages."""
    return AdapterImage(digest=name, path=str(num_pages))


def next_token(token_ids: list[int], digest: str | None) -> int:
    """What the simulated model says: a function of all tokens and of the adapter."""
    state = len(digest or "") + (ord(digest[-1]) if digest else 0)
    for token in token_ids:
        state = (state * 31 + token + 7) % 1009
    return state % VOCAB


class HandLoader:
    """Writes its mark into the pages at once, and ends a load only when it is told to."""

    def __init__(self, memory: list[object]) -> None:
        self.memory = memory
        self.pending: list[tuple[AdapterImage, tuple[int, ...], Callable]] = []
        self.refused: set[str] = set()

    def measure(self, image: AdapterImage) -> ImageSize:
        if image.digest in self.refused:
            raise ImageError(f"adapter {image.digest}: refused by its header")
        return ImageSize(int(image.path), int(image.path))

    def start(self, image, pages, finish) -> None:
        self.pending.append((image, tuple(pages), finish))

    def finish(self, index: int = 0) -> None:
        image, pages, finish = self.pending.pop(index % len(self.pending))
        for i, page in enumerate(pages):
            self.memory[page] = (image.digest, i)
        row_ptr = torch.zeros(len(TARGET_PATHS) + 1, dtype=torch.int32)
        row_ptr[1:] = len(pages)
        offsets = torch.arange(len(pages)) * PAGE_ELEMENTS
        finish(RankTable(row_ptr, offsets, torch.ones(len(pages))))

    def fail(self, index: int = 0) -> None:
        image, pages, finish = self.pending.pop(index % len(self.pending))
        for page in pages[: len(pages) // 2]:
            self.memory[page] = (image.digest, "half")
        finish(ImageError(f"adapter {image.digest}: the disk is on fire"))

    def close(self) -> None:
        self.pending.clear()


class Simulation:
    """A scheduler with its memory, a model that checks what it is given, and all events."""

    def __init__(
        self,
        *,
        num_pages: int = 12,
        block_size: int = 4,
        num_slots: int = 3,
        max_num_seqs: int = 4,
        max_batched_tokens: int = 8,
        max_context: int = 40,
        attention_context: int | None = None,
        max_passes: int = 3,
        lookahead: int = 128,
    ) -> None:
        targets = tuple(TargetShape(name, 8, 8) for name in TARGET_PATHS)
        layout = BaseLayout("toy", 1, targets, PAGE_ELEMENTS, "float32")
        self.pool = PagePool(num_pages, PAGE_ELEMENTS, torch.float32, "cpu")
        self.memory: list[object] = [None] * num_pages
        self.loader = HandLoader(self.memory)
        self.adapters = AdapterPool(self.pool, num_slots, 64, layout, loader=self.loader)
        self.kv_cache = KVCache(self.pool, block_size)
        self.scheduler = Scheduler(
            self.kv_cache,
            self.adapters,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_context=max_context,
            attention_context=attention_context,
            max_passes=max_passes,
            lookahead=lookahead,
        )
        self.block_size, self.max_passes, self.max_context = block_size, max_passes, max_context
        self.max_batched_tokens = max_batched_tokens
        self.requests: dict[str, Submit] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.dropped: list[Dropped] = []
        self.num_drops = 0
        self.passes: dict[str, int] = {}
        self.last_plan: StepPlan | None = None

    def submit(
        self,
        request_id: str,
        num_prompt: int = 3,
        max_tokens: int = 4,
        adapter: AdapterImage | None = None,
        stop: tuple[int, ...] = (),
    ) -> None:
        prompt = tuple((len(self.requests) * 5 + i) % VOCAB for i in range(num_prompt))
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=stop)
        request = Submit(
            request_id=request_id, prompt_token_ids=prompt, sampling=sampling, adapter=adapter
        )
        self.scheduler.submit(request)
        self.requests[request_id], self.tokens[request_id] = request, []
        self.take(self.scheduler.take_events())

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)
        self.take(self.scheduler.take_events())

    def drop(self, digest: str, abort: bool = False) -> None:
        self.num_drops += 1
        self.scheduler.drop(digest, abort)
        self.take(self.scheduler.take_events())

    def step(self) -> list[str]:
        """One step, fully checked; the ids that it computed, in the plan's order."""
        before = {s.request_id: s.num_preemptions for s in self.scheduler._waiting}
        arrivals = {s.request_id: s.arrival for s in self.scheduler._live.values()}
        running = {s.request_id for s in self.scheduler._running}
        pinned = {a.digest: a.num_users for a in self.adapters.report() if a.num_users}
        plan = self.last_plan = self.scheduler.plan()
        self.take(self.scheduler.take_events())
        self.check()
        if plan is None:
            has_load = self.adapters.num_loading > 0
            assert has_load or not self.scheduler._live, "nothing runs and nothing loads"
            return []
        ids = [item.sequence.request_id for item in plan.items]
        self._count_passes(before, arrivals, admitted=set(ids) - running)
        assert plan.num_tokens <= self.max_batched_tokens
        slots = [item.slot for item in plan.items]
        assert slots == sorted(slots), "a plan is ordered by slot"
        for item in plan.items:
            digest = item.sequence.wanted_digest
            assert digest not in pinned or self.adapters.is_resident(digest), "evicted in use"
        sampled = [token for item in plan.items for token in self._compute(item)]
        self.take(self.scheduler.commit(plan, sampled))
        self.take(self.scheduler.take_events())
        self.check()
        return ids

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left, finishing each load when nothing else can go on."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            if not self.step() and self.loader.pending:
                self.loader.finish()
        raise AssertionError(f"still busy after {max_steps} steps: {self.scheduler._live}")

    def alone(self, request_id: str) -> list[int]:
        """The oracle: the same request without a scheduler, without stop token."""
        request = self.requests[request_id]
        tokens = list(request.prompt_token_ids)
        digest = request.adapter.digest if request.adapter else None
        for _ in range(request.sampling.max_tokens):
            token = next_token(tokens, digest)
            if token in request.sampling.stop_token_ids or len(tokens) >= self.max_context:
                break
            tokens.append(token)
        return tokens[len(request.prompt_token_ids) :]

    def take(self, events) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                assert event.request_id not in self.finished, "a token after the end"
                self.tokens[event.request_id].extend(event.token_ids)
                self._check_digest(event.request_id, event.adapter_digest)
            elif isinstance(event, Finished):
                assert event.request_id not in self.finished, "two ends"
                self.finished[event.request_id] = event
                if self.tokens.get(event.request_id):
                    self._check_digest(event.request_id, event.adapter_digest)
            else:
                self.dropped.append(event)

    def check(self) -> None:
        for part in (self.pool, self.kv_cache, self.adapters, self.scheduler):
            part.check()
        used = self.kv_cache.num_pages + self.adapters.num_pages
        assert used + self.pool.num_free == self.pool.num_pages, "pages without an owner"
        users: dict[str, int] = {}
        for sequence in self.scheduler._running:
            if (digest := sequence.wanted_digest) is not None:
                users[digest] = users.get(digest, 0) + 1
        held = {a.digest: a.num_users for a in self.adapters.report() if a.num_users}
        assert held == users, "pins and running sequences differ"

    def _check_digest(self, request_id: str, digest: str | None) -> None:
        adapter = self.requests[request_id].adapter
        assert digest == (adapter.digest if adapter else None)

    def _compute(self, item: PlannedSequence) -> list[SampledToken]:
        sequence = item.sequence
        assert sequence.status is Status.RUNNING
        table = self.kv_cache.table(sequence.request_id)
        stop = item.start + item.num_tokens
        for position in range(item.start, stop):
            page, offset = divmod(position, self.block_size)
            key = (sequence.request_id, position, sequence.token_ids[position])
            block = self.memory[table[page]]
            if not isinstance(block, dict):
                block = self.memory[table[page]] = {}
            block[offset] = key
        for position in range(stop):
            page, offset = divmod(position, self.block_size)
            key = (sequence.request_id, position, sequence.token_ids[position])
            block = self.memory[table[page]]
            assert isinstance(block, dict)
            assert block[offset] == key, "keys of something else"
        digest = self._read_adapter(item.slot)
        assert item.samples == (stop == sequence.num_tokens)
        return [SampledToken(next_token(sequence.token_ids, digest))] if item.samples else []

    def _read_adapter(self, slot: int) -> str | None:
        if slot < 0:
            return None
        rows = self.adapters.rows
        num_rows = int(rows.row_ptr[slot, -1])
        pages = (rows.row_offset[slot, :num_rows] // PAGE_ELEMENTS).tolist()
        found = [self.memory[page] for page in pages]
        digest = self.adapters.digest_of(slot)
        assert found == [(digest, i) for i in range(num_rows)], "rows of something else"
        return digest

    def _count_passes(self, before, arrivals, admitted) -> None:
        preempted = {s.request_id for s in self.scheduler._live.values() if s.num_preemptions}

        def place(request_id: str) -> tuple[bool, int]:
            return request_id not in preempted, arrivals[request_id]

        for sequence in self.scheduler._waiting:
            request_id = sequence.request_id
            if before.get(request_id) != sequence.num_preemptions:
                continue  # preempted in this step
            passes = sum(place(other) > place(request_id) for other in admitted)
            self.passes[request_id] = self.passes.get(request_id, 0) + passes
            assert self.passes[request_id] <= self.max_passes, "passed too often"


class HostSyncs(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, though all tensors are on the CPU.

    Transfers to the host, values that Python asks for, shapes that depend on values, and values
    that come from Python's own lists, whose copy to a GPU is not asynchronous.
    """

    FUNCTIONS = frozenset({"tolist", "cpu", "tensor", "as_tensor"})
    OPERATIONS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._operations = _Operations(self.seen)

    def __enter__(self):
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._operations.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        is_listed = name in ("__getitem__", "__setitem__") and any(
            isinstance(part, list) for part in (args[1] if type(args[1]) is tuple else args[1:2])
        )
        if name in self.FUNCTIONS or is_listed:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """The part of HostSyncs that lies below Python's functions."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_") else []
        is_masked = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in HostSyncs.OPERATIONS or is_masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_syncs() -> HostSyncs:
    """A context; `seen` names the waits that happened in it."""
    return HostSyncs()


@pytest.fixture(scope="session")
def simulate() -> type[Simulation]:
    return Simulation


@pytest.fixture(scope="session")
def image() -> Callable[[str, int], AdapterImage]:
    return image_of
