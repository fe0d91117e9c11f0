"""Decides what each step computes: which sequences, how many of their tokens, in which slots.

Plain Python over integers; knows no tensors, no device and no text.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from server.engine.budget import Budget
from server.engine.drains import Drains
from server.engine.plan import PlannedSequence as PlannedSequence
from server.engine.plan import SampledToken as SampledToken
from server.engine.plan import StepPlan as StepPlan
from server.engine.request import Dropped, Finished, TokenEvent
from server.engine.sequence import Sequence, Status
from server.engine.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from server.engine.request import FinishReason, Submit
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache

MAX_PASSES = 64
"""Admissions of later requests that a waiting one lets by; then nothing goes before it."""

LOOKAHEAD = 128
"""Waiting requests that one step looks at, from the front."""

MAX_LOADING = 4
"""Adapters that load at once: enough to keep the copying busy, few enough to stay in order."""


class DuplicateRequestError(ValueError):
    """A request_id that is live was submitted again; the live request goes on."""


class Scheduler:
    """Owns every sequence from submit to its one Finished.

    A step is plan() → run → commit(); submit, cancel and drop come between steps, or between plan
    and commit. Contract on order: running decodes, then running prefills, then admissions in
    queue order. Only a request whose adapter is not resident is passed by those behind it, and by
    at most `max_passes` of them. Preempted sequences stand before all others.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        adapter_pool: AdapterPool,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_context: int,
        attention_context: int | None = None,
        max_passes: int = MAX_PASSES,
        lookahead: int = LOOKAHEAD,
    ) -> None:
        """See `Budget` for `attention_context`.

        Raises ValueError at a limit below 1 (`max_passes`: below 0; `max_context`: below 2).
        """
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("max_batched_tokens", max_batched_tokens, 1),
            ("max_context", max_context, 2),
            ("attention_context", 1 if attention_context is None else attention_context, 1),
            ("max_passes", max_passes, 0),
            ("lookahead", lookahead, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}: it has to be at least {least}")
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of prompts that were computed to their end
        self.num_generated_tokens = 0
        self._kv_cache = kv_cache
        self._adapters = adapter_pool
        self._max_num_seqs = max_num_seqs
        self._budget = Budget(max_batched_tokens, attention_context)
        self._max_context = max_context
        self._max_passes = max_passes
        self._lookahead = lookahead
        self._live: dict[str, Sequence] = {}
        self._running: list[Sequence] = []  # in order of arrival: the newest is preempted first
        self._waiting = WaitingQueue()
        self._wanted: frozenset[str] = frozenset()  # adapters of the queue's front
        self._drains = Drains()
        self._events: list[Finished | Dropped] = []
        self._open_plan: StepPlan | None = None
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        """Whether plan() has something to do or to wait for: requests, loads or drops."""
        return bool(self._live or self._drains or self._adapters.num_loading)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Submit) -> None:
        """Queue a request. One that cannot be served at all ends at once (see take_events).

        Raises DuplicateRequestError for the id of a live request. Nothing is answered under that
        id then, since it would end the other one.
        """
        if request.request_id in self._live:
            raise DuplicateRequestError(
                f"request {request.request_id} is live already: give each request its own id"
            )
        sequence = Sequence(request, self._num_submitted)
        self._num_submitted += 1
        self._live[request.request_id] = sequence
        self._waiting.submit(sequence)
        if request.sampling.max_tokens < 1:
            self._events.append(self._finish(sequence, "length"))
        elif sequence.num_prompt == 0:
            self._fail(sequence, "the prompt has 0 tokens: send at least 1", "invalid_request")
        elif sequence.num_prompt >= self._max_context:
            self._fail(
                sequence,
                f"the prompt has {sequence.num_prompt} tokens, the context holds "
                f"{self._max_context} with at least 1 of the completion: shorten the prompt",
                "context_length_exceeded",
            )
        elif self._kv_cache.blocks_for(sequence.num_prompt) > self._kv_cache.max_blocks:
            self._fail(sequence, self._too_large(sequence), "context_length_exceeded")

    def cancel(self, request_id: str) -> None:
        """End a request with reason "cancelled"; unknown and ended ids are ignored."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._events.append(self._finish(sequence, "cancelled"))
            self._settle_drains()

    def drop(self, digest: str, abort: bool = False) -> None:
        """Free an adapter once the requests for it that are live now have ended; then Dropped.

        `abort` cancels them. Requests submitted later wait until then and load it anew.
        """
        members = [s for s in self._live.values() if s.wanted_digest == digest]
        self._drains.begin(digest, members)
        if abort:
            self._events.extend([self._finish(sequence, "cancelled") for sequence in members])
        self._settle_drains()

    def take_events(self) -> list[Finished | Dropped]:
        """What ended outside of commit, oldest first; each is returned once."""
        events, self._events = self._events, []
        return events

    def plan(self) -> StepPlan | None:
        """The next step; None when nothing can run before a load ends or a message comes.

        Takes in finished loads, starts those that the queue's front needs, admits, preempts.
        Every plan has to be given to commit or abandon before the next.
        """
        assert self._open_plan is None, "the last plan was neither committed nor abandoned"
        self._settle_loads()
        num_ended = len(self._events)
        # An empty step that ended a request, or refused an image, may have made way for others.
        while not (items := self._schedule()):
            if not self._settle_loads() and len(self._events) == num_ended:
                return None
            num_ended = len(self._events)
        items.sort(key=lambda item: (item.slot, item.sequence.arrival))
        self._open_plan = StepPlan(tuple(items))
        return self._open_plan

    def commit(self, plan: StepPlan, sampled: Seq[SampledToken]) -> list[TokenEvent | Finished]:
        """Take in a step's result: one token for each item that samples, in the plan's order.

        What was cancelled since the plan is left out. Raises ValueError at another number of
        tokens.
        """
        assert plan is self._open_plan, "only the last plan can be committed, once"
        if len(sampled) != plan.num_samples:
            raise ValueError(
                f"{len(sampled)} sampled tokens for a plan that samples {plan.num_samples}"
            )
        self._open_plan = None
        events: list[TokenEvent | Finished] = []
        tokens = iter(sampled)
        for item in plan.items:
            token = next(tokens) if item.samples else None
            if item.sequence.status is Status.RUNNING:
                self._advance(item)
                if token is not None:
                    events.extend(self._accept(item.sequence, token))
        self._settle_drains()
        return events

    def abandon(self, plan: StepPlan, error: str, error_code: str) -> list[Finished]:
        """End every sequence of a plan whose step failed; the others go on."""
        assert plan is self._open_plan, "only the last plan can be abandoned, once"
        self._open_plan = None
        sequences = [i.sequence for i in plan.items if i.sequence.status is Status.RUNNING]
        events = [self._finish(s, "error", error=error, error_code=error_code) for s in sequences]
        self._settle_drains()
        return events

    def check(self) -> None:
        """Recompute the invariants of sequences and queues; AssertionError when one is broken."""
        self._waiting.check()
        arrivals = [sequence.arrival for sequence in self._running]
        assert arrivals == sorted(arrivals), "running sequences are out of order"
        assert len(self._running) <= self._max_num_seqs
        for status, group in ((Status.RUNNING, self._running), (Status.WAITING, self._waiting)):
            for sequence in group:
                sequence.check()
                assert sequence.status is status
                assert self._live[sequence.request_id] is sequence
                assert sequence.num_passes <= self._max_passes
        assert len(self._live) == len(self._running) + len(self._waiting)
        for sequence in self._running:
            if sequence.slot is not None and sequence.slot >= 0:
                assert self._adapters.digest_of(sequence.slot) == sequence.wanted_digest
            assert self._kv_cache.blocks_needed(sequence.request_id, sequence.num_computed) == 0
        for sequence in self._waiting:
            assert self._kv_cache.blocks_needed(
                sequence.request_id, sequence.num_tokens
            ) == self._kv_cache.blocks_for(sequence.num_tokens), "a waiting sequence has blocks"

    # One step.

    def _schedule(self) -> list[PlannedSequence]:
        decodes = [s for s in self._running if s.num_uncomputed == 1]
        prefills = [s for s in self._running if s.num_uncomputed > 1]
        items = self._plan_running(decodes, self._budget.num_tokens, 1)
        budget = self._budget.num_tokens - len(items)
        num_long = sum(self._budget.is_long(s.num_tokens) for s in prefills)
        piece = self._budget.piece(len(items), num_long)
        chunks = self._plan_running(prefills, budget, piece)
        budget -= sum(self._budget.cost(chunk) for chunk in chunks)
        admitted, has_room = self._admit(budget, piece)
        self._prefetch(has_room)
        return items + chunks + admitted

    def _plan_running(
        self, sequences: Seq[Sequence], budget: int, piece: int
    ) -> list[PlannedSequence]:
        items: list[PlannedSequence] = []
        for sequence in sequences:
            # Growing an older one may have preempted it.
            if budget > 0 and sequence.status is Status.RUNNING and self._grow(sequence):
                items.append(self._planned(sequence, budget, piece))
                budget -= self._budget.cost(items[-1])
        return items

    def _planned(self, sequence: Sequence, budget: int, piece: int) -> PlannedSequence:
        if self._budget.is_long(sequence.num_tokens):
            budget = min(budget, piece)
        num_tokens = min(
            self._budget.affordable(sequence.num_computed, budget), sequence.num_uncomputed
        )
        assert sequence.slot is not None
        return PlannedSequence(
            sequence=sequence,
            start=sequence.num_computed,
            num_tokens=num_tokens,
            slot=sequence.slot,
            samples=num_tokens == sequence.num_uncomputed,
        )

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for its known tokens; False when it had to stop."""
        while (num_missing := self._num_missing(sequence)) > 0:
            if self._adapters.evict_idle(num_missing, keep=self._wanted):
                continue
            if self._adapters.evict_idle(num_missing):
                continue
            victim = self._running[-1]
            if len(self._running) == 1 and self._adapters.num_loading == 0:
                self._fail(sequence, self._too_large(sequence), "context_length_exceeded")
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        self._kv_cache.extend(sequence.request_id, sequence.num_tokens)
        return True

    def _admit(self, budget: int, piece: int) -> tuple[list[PlannedSequence], bool]:
        """Start waiting sequences; False beside them when one had to wait for KV pages."""
        items: list[PlannedSequence] = []
        passed: list[tuple[Sequence, int]] = []  # with the number of admissions before it
        allowance = self._max_num_seqs
        has_room = True
        for sequence in self._waiting.first(self._lookahead):
            if budget <= 0 or allowance == 0 or len(self._running) >= self._max_num_seqs:
                break
            if not self._is_ready(sequence):
                passed.append((sequence, len(items)))
                allowance = min(allowance, self._max_passes - sequence.num_passes)
            elif self._find_room(sequence):
                items.append(self._start(sequence, budget, piece))
                budget -= self._budget.cost(items[-1])
                allowance -= 1
            elif self._running or self._adapters.num_loading:
                has_room = False
                break
            else:
                self._fail(sequence, self._too_large(sequence), "context_length_exceeded")
        for sequence, num_before in passed:
            sequence.num_passes += len(items) - num_before
        return items, has_room

    def _is_ready(self, sequence: Sequence) -> bool:
        digest = sequence.wanted_digest
        if digest is None:
            return True
        return self._adapters.is_resident(digest) and not self._drains.holds_back(sequence)

    def _find_room(self, sequence: Sequence) -> bool:
        """Make room for all its known tokens, if evicting idle adapters is enough for it.

        One page for each running sequence stays free, or admitting would soon mean preempting.
        """
        num_missing = self._num_missing(sequence) + len(self._running)
        keep = () if sequence.wanted_digest is None else (sequence.wanted_digest,)
        if num_missing > 0:
            if self._adapters.num_idle_pages(keep) < num_missing:
                return False
            self._adapters.evict_idle(num_missing, keep)
        return True

    def _start(self, sequence: Sequence, budget: int, piece: int) -> PlannedSequence:
        digest = sequence.wanted_digest
        slot = -1 if digest is None else self._adapters.acquire(digest)
        assert slot is not None, "only a resident adapter's sequence is ready"
        self._kv_cache.extend(sequence.request_id, sequence.num_tokens)
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=lambda s: s.arrival)
        sequence.slot = slot
        sequence.status = Status.RUNNING
        return self._planned(sequence, budget, piece)

    def _prefetch(self, has_room: bool) -> None:
        """Load what the queue's front needs, in its order, unless a sequence waits for pages."""
        wanted: set[str] = set()
        for sequence in self._waiting.first(self._lookahead):
            image = sequence.request.adapter
            if image is None or image.digest in wanted or self._drains.holds_back(sequence):
                continue
            if not self._adapters.is_resident(image.digest):
                is_bounded = has_room and self._adapters.num_loading < MAX_LOADING
                # Behind one that finds no room nothing is loaded: it would take the room first.
                if not is_bounded or not self._adapters.request(
                    image, keep=wanted, num_spare=len(self._running)
                ):
                    break
            wanted.add(image.digest)
        self._wanted = frozenset(wanted)

    # Sequences.

    def _num_missing(self, sequence: Sequence) -> int:
        """Pages to be freed before it has blocks for its known tokens; negative = to spare."""
        needed = self._kv_cache.blocks_needed(sequence.request_id, sequence.num_tokens)
        return needed - self._kv_cache.num_free

    def _advance(self, item: PlannedSequence) -> None:
        sequence = item.sequence
        assert sequence.num_computed == item.start
        sequence.num_computed += item.num_tokens
        # The slot, not the request, says which adapter computed them.
        sequence.adapter_digest = None if item.slot < 0 else self._adapters.digest_of(item.slot)

    def _accept(self, sequence: Sequence, token: SampledToken) -> list[TokenEvent | Finished]:
        sampling = sequence.request.sampling
        self.num_generated_tokens += 1
        if sequence.num_generated == 0:
            self.num_prompt_tokens += sequence.num_prompt
        if token.token_id in sampling.stop_token_ids:
            return [self._finish(sequence, "stop", num_unseen=1)]
        sequence.token_ids.append(token.token_id)
        events: list[TokenEvent | Finished] = [
            TokenEvent(
                request_id=sequence.request_id,
                token_ids=(token.token_id,),
                logprobs=None if token.logprobs is None else (token.logprobs,),
                adapter_digest=sequence.adapter_digest,
            )
        ]
        is_full = sequence.num_tokens >= self._max_context
        if is_full or sequence.num_generated >= sampling.max_tokens:
            events.append(self._finish(sequence, "length"))
        return events

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.requeue(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give back what a running sequence holds."""
        self._running.remove(sequence)
        self._kv_cache.free(sequence.request_id)
        if sequence.wanted_digest is not None:
            self._adapters.release(sequence.wanted_digest)
        sequence.slot = None

    def _fail(self, sequence: Sequence, error: str, error_code: str) -> None:
        self._events.append(self._finish(sequence, "error", error=error, error_code=error_code))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        num_unseen: int = 0,
        error: str | None = None,
        error_code: str | None = None,
    ) -> Finished:
        """End a live sequence and return its one final event; `num_unseen` counts a stop token."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        del self._live[sequence.request_id]
        self._drains.leave(sequence)
        return Finished(
            request_id=sequence.request_id,
            reason=reason,
            num_prompt_tokens=sequence.num_prompt,
            num_completion_tokens=sequence.num_generated + num_unseen,
            adapter_digest=sequence.adapter_digest,
            error=error,
            error_code=error_code,
        )

    def _too_large(self, sequence: Sequence) -> str:
        num_blocks = self._kv_cache.blocks_for(sequence.num_tokens)
        return (
            f"{sequence.num_tokens} tokens take {num_blocks} pages beside those of the adapter, "
            f"and the pool has {self._kv_cache.max_blocks}: shorten the prompt or the completion, "
            "or make the pool larger (pool_bytes)"
        )

    # Adapters.

    def _settle_loads(self) -> bool:
        """Take in the loads that ended; whether there were any."""
        results = self._adapters.poll()
        failed = {digest: error for digest, error in results if error is not None}
        if failed:
            for sequence in [s for s in self._waiting if s.wanted_digest in failed]:
                error = failed[sequence.wanted_digest or ""]
                self._fail(sequence, error, "adapter_load_failed")
        self._settle_drains()
        return bool(results)

    def _settle_drains(self) -> None:
        if self._drains:
            self._events.extend(self._drains.settle(self._adapters))
