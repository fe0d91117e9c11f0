"""A simulated engine around the scheduler: loads finished by hand, memory that remembers writers.

Each page remembers who wrote what into it, so that a step can tell whether the keys it reads and
the adapter rows it uses are those that it should see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from server.engine.overload import QueueLimits
from server.engine.request import (
    AdapterImage,
    AdapterPart,
    Dropped,
    Finished,
    Sampling,
    Submit,
    TokenEvent,
    combination,
)
from server.engine.scheduler import PlannedSequence, SampledToken, Scheduler, StepPlan
from server.engine.sequence import Status
from server.memory.adapter_pool import AdapterPool
from server.memory.host_images import HostImages
from server.memory.image_file import ImageError, ImageSize, RankTable
from server.memory.image_loader import LoadCancelled
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool

PAGE_ELEMENTS = 16
STOP_TOKEN = 0
VOCAB = 11


def image_of(name: str, num_pages: int) -> AdapterImage:
    """An image that the simulated loader understands: its path is its number of pages."""
    return AdapterImage(digest=name, path=str(num_pages))


def mix_of(**members: tuple[int, float]) -> AdapterImage:
    """A combination of such images, given as name=(pages, weight)."""
    return combination(
        AdapterPart(image_of(name, num_pages), weight)
        for name, (num_pages, weight) in members.items()
    )


def next_token(token_ids: list[int], digest: str | None) -> int:
    """What the simulated model says: a function of all tokens and of the adapter."""
    state = len(digest or "") + (ord(digest[-1]) if digest else 0)
    for token in token_ids:
        state = (state * 31 + token + 7) % 1009
    return state % VOCAB


class HandLoader:
    """Writes its mark into the pages, and ends a load, only when it is told to."""

    def __init__(self, memory: list[object]) -> None:
        self.memory = memory
        self.pending: list[tuple[AdapterImage, tuple[int, ...], Callable]] = []
        self.refused: set[str] = set()
        self.cancelled: set[str] = set()
        self.host = HostImages(0, 1)

    def measure(self, image: AdapterImage) -> ImageSize:
        if image.digest in self.refused:
            raise ImageError(f"adapter {image.digest}: refused by its header")
        return ImageSize(int(image.path), int(image.path))

    def start(self, image, pages, finish) -> None:
        assert all(image.digest != other.digest for other, _, _ in self.pending), "loaded twice"
        self.cancelled.discard(image.digest)
        self.pending.append((image, tuple(pages), finish))

    def cancel(self, digest: str) -> None:
        self.cancelled.add(digest)

    def finish(self, index: int = 0) -> None:
        image, pages, finish = self.pending.pop(index % len(self.pending))
        for i, page in enumerate(pages):
            self.memory[page] = (image.digest, i)
        if image.digest in self.cancelled:
            finish(LoadCancelled(f"adapter {image.digest}: cancelled"))
            return
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
        prefix_cache: bool = True,
        max_num_seqs: int = 4,
        max_batched_tokens: int = 8,
        max_context: int = 40,
        attention_context: int | None = None,
        max_passes: int = 3,
        lookahead: int = 128,
        queue_limits: QueueLimits | None = None,
    ) -> None:
        self.now = 0.0  # seconds; stands still unless a test moves it
        targets = tuple(TargetShape(name, 8, 8) for name in TARGET_PATHS)
        layout = BaseLayout("toy", 1, targets, PAGE_ELEMENTS, "float32")
        self.pool = PagePool(num_pages, PAGE_ELEMENTS, torch.float32, "cpu")
        self.memory: list[object] = [None] * num_pages
        self.loader = HandLoader(self.memory)
        self.adapters = AdapterPool(self.pool, num_slots, 64, layout, loader=self.loader)
        self.kv_cache = KVCache(self.pool, block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(
            self.kv_cache,
            self.adapters,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_context=max_context,
            attention_context=attention_context,
            max_passes=max_passes,
            lookahead=lookahead,
            queue_limits=queue_limits,
            clock=lambda: self.now,
        )
        self.block_size, self.max_context = block_size, max_context
        self.max_batched_tokens = max_batched_tokens
        self.requests: dict[str, Submit] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, Finished] = {}
        self.dropped: list[Dropped] = []
        self.num_drops = 0
        self.last_plan: StepPlan | None = None

    def submit(
        self,
        request_id: str,
        num_prompt: int = 3,
        max_tokens: int = 4,
        adapter: AdapterImage | None = None,
        stop: tuple[int, ...] = (),
        prompt: Iterable[int] | None = None,
        salt: str = "",
        **fields: object,
    ) -> None:
        """Without a `prompt` it is one of `num_prompt` tokens that no other begins with.

        `fields` are further ones of Submit.
        """
        if prompt is None:
            number = len(self.requests)
            prompt = [
                (number // VOCAB**i if i < 3 else number * 5 + i) % VOCAB for i in range(num_prompt)
            ]
        request = Submit(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=Sampling(max_tokens=max_tokens, stop_token_ids=stop),
            adapter=adapter,
            cache_salt=salt,
            **fields,
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
        pinned = {a.digest: a.num_users for a in self.adapters.report() if a.num_users}
        plan = self.last_plan = self.scheduler.plan()
        self.take(self.scheduler.take_events())
        self.check()
        if plan is None:
            has_load = self.adapters.num_loading > 0
            assert has_load or not self.scheduler._live, "nothing runs and nothing loads"
            return []
        ids = [item.sequence.request_id for item in plan.items]
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
        used = self.kv_cache.num_pages + self.kv_cache.num_cached_pages + self.adapters.num_pages
        assert used + self.pool.num_free == self.pool.num_pages, "pages without an owner"
        users: dict[str, int] = {}
        for sequence in self.scheduler._running:
            for member in sequence.members:
                users[member.digest] = users.get(member.digest, 0) + 1
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
        origin = (sequence.request.cache_salt, self._read_adapter(item))
        # The keys of a token follow from all tokens before it, and from who computed them.
        keys = [(*origin, *sequence.token_ids[: n + 1]) for n in range(stop)]
        published = {block.page for block in self.kv_cache.prefixes}
        for position in range(item.start, stop):
            page, offset = divmod(position, self.block_size)
            assert table[page] not in published, "writes to a block that others may have"
            block = self.memory[table[page]]
            if not isinstance(block, dict):
                block = self.memory[table[page]] = {}
            block[offset] = keys[position]
        for position in range(stop):
            page, offset = divmod(position, self.block_size)
            block = self.memory[table[page]]
            assert isinstance(block, dict)
            assert block[offset] == keys[position], "keys of something else"
        digest = origin[1]
        assert item.samples == (stop == sequence.num_tokens)
        return [SampledToken(next_token(sequence.token_ids, digest))] if item.samples else []

    def _read_adapter(self, item: PlannedSequence) -> str | None:
        slot, image = item.slot, item.sequence.request.adapter
        if slot < 0:
            return None
        rows = self.adapters.rows
        num_rows = int(rows.row_ptr[slot, -1])
        pages = (rows.row_offset[slot, :num_rows] // PAGE_ELEMENTS).tolist()
        found = [self.memory[page] for page in pages]
        digest = self.adapters.digest_of(slot)
        if image.parts:
            weights = [x.weight for x in image.parts for _ in range(int(x.image.path))]
            assert rows.row_scale[slot, :num_rows].tolist() == weights
            wanted = [(x.digest, i) for x in image.members for i in range(int(x.path))]
        else:
            wanted = [(digest, i) for i in range(num_rows)]
        assert found == wanted, "rows of something else"
        return digest


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


@pytest.fixture(scope="session")
def mix() -> Callable[..., AdapterImage]:
    return mix_of
