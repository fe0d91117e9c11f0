"""Decides what each step computes: which sequences, how many of their tokens, in which slots.

Plain Python over integers; knows no tensors, no device and no text.
"""

from __future__ import annotations

import time
from bisect import insort
from operator import attrgetter
from typing import TYPE_CHECKING

from server.engine.budget import Budget
from server.engine.drains import Drains
from server.engine.endings import Fault, final_event, too_large, unservable
from server.engine.fairness import VirtualCounters
from server.engine.load_ahead import LOOKAHEAD, LoadAhead
from server.engine.overload import Overload, QueueLimits
from server.engine.plan import PlannedSequence as PlannedSequence
from server.engine.plan import SampledToken as SampledToken
from server.engine.plan import StepPlan as StepPlan
from server.engine.request import TokenEvent
from server.engine.sequence import Sequence, Status
from server.engine.waiting import WaitingQueue
from server.memory.reclaim import Reclaimer

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from server.engine.request import Dropped, Finished, FinishReason, Submit
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache

MAX_PASSES = 64
"""Later heads that a head of the queue lets by; see `WaitingQueue`."""


class DuplicateRequestError(ValueError):
    """A request_id that is live was submitted again; the live request goes on."""


class Scheduler:
    """Owns every sequence from submit to its one Finished.

    A step is plan() → run → commit(); submit, cancel and drop come between steps, or between plan
    and commit. Contract on order: running decodes, then running prefills, then admissions in the
    order of `WaitingQueue` and within its bound on passes. Requests whose adapter loads, or waits
    for its place among the loads, or drains, are passed freely: a slow load delays those that
    wait for it. One whose adapter finds no room (pages or a slot) is passed within the bound, and
    so are requests that find no pages: then nothing goes before them.
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
        queue_limits: QueueLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `Budget` for `attention_context`; `clock` gives seconds, for deadlines in the queue.

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
        self.num_cached_tokens = 0  # of prompts that were admitted
        self._kv_cache = kv_cache
        self._adapters = adapter_pool
        self._reclaimer = Reclaimer(kv_cache, adapter_pool)
        self._max_num_seqs = max_num_seqs
        self._budget = Budget(max_batched_tokens, attention_context)
        self._max_context = max_context
        self._live: dict[str, Sequence] = {}
        self._running: list[Sequence] = []  # in order of arrival: the newest is preempted first
        self._counters = VirtualCounters()
        self._waiting = WaitingQueue(self._counters, max_passes)
        limits = queue_limits or QueueLimits()
        self._overload = Overload(self._waiting, self._counters, limits, clock)
        self._drains = Drains()
        self._ahead = LoadAhead(
            self._waiting, adapter_pool, self._reclaimer, self._drains, lookahead
        )
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
        fault = unservable(sequence, self._max_context, self._kv_cache, self._adapters)
        fault = fault or self._overload.meet(sequence)
        if fault is not None:
            self._events.append(final_event(sequence, "error", fault))
        elif request.sampling.max_tokens < 1:
            self._events.append(final_event(sequence, "length"))
        else:
            self._live[request.request_id] = sequence
            self._waiting.submit(sequence)

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
        members = [s for s in self._live.values() if digest in s.digests]
        self._drains.begin(digest, members)
        self._waiting.unpark(digest)  # what an earlier Drop held back is a member now
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
        for sequence, fault in self._overload.expired():
            self._fail(sequence, fault)
        num_ended = len(self._events)
        # An empty step that ended a request, or refused an image, may have made way for others.
        while not (items := self._schedule()):
            if not self._settle_loads() and len(self._events) == num_ended:
                return None
            num_ended = len(self._events)
        items.sort(key=attrgetter("slot"))  # within a slot: decodes, prefills, admissions
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
                    self._accept(item.sequence, token, events)
        self._settle_drains()
        return events

    def abandon(self, plan: StepPlan, error: str, error_code: str) -> list[Finished]:
        """End every sequence of a plan whose step failed; the others go on."""
        assert plan is self._open_plan, "only the last plan can be abandoned, once"
        self._open_plan = None
        sequences = [i.sequence for i in plan.items if i.sequence.status is Status.RUNNING]
        events = [self._finish(s, "error", Fault(error, error_code)) for s in sequences]
        self._settle_drains()
        return events

    def check(self) -> None:
        """Recompute the invariants of sequences and queues; AssertionError when one is broken."""
        self._waiting.check()
        self._reclaimer.check()
        arrivals = [sequence.arrival for sequence in self._running]
        assert arrivals == sorted(arrivals), "running sequences are out of order"
        assert len(self._running) <= self._max_num_seqs
        for status, group in ((Status.RUNNING, self._running), (Status.WAITING, self._waiting)):
            for sequence in group:
                sequence.check()
                assert sequence.status is status
                assert self._live[sequence.request_id] is sequence
        assert len(self._live) == len(self._running) + len(self._waiting)
        for sequence in self._running:
            if sequence.slot is not None and sequence.slot >= 0:
                assert self._adapters.digest_of(sequence.slot) == sequence.wanted_digest
            assert self._kv_cache.blocks_needed(sequence.request_id, sequence.num_computed) == 0
        for sequence in self._waiting:
            is_parked = self._waiting.is_parked(sequence)
            assert not (is_parked and self._ahead.is_ready(sequence)), "one that can run is parked"
            assert self._kv_cache.blocks_needed(
                sequence.request_id, sequence.num_tokens
            ) == self._kv_cache.blocks_for(sequence.num_tokens), "a waiting sequence has blocks"

    # One step.

    def _schedule(self) -> list[PlannedSequence]:
        num_preemptions = self.num_preemptions
        items, prefills = self._plan_decodes()
        budget = self._budget.num_tokens - len(items)
        num_long = sum(self._budget.is_long(s.num_to_compute) for s in prefills)
        piece = self._budget.piece(len(items), num_long)
        chunks = self._plan_running(prefills, budget, piece)
        budget -= sum(self._budget.cost(chunk) for chunk in chunks)
        items += chunks
        if self.num_preemptions > num_preemptions:
            # Room for one may have been made by preempting another that was planned before it.
            items = [item for item in items if item.sequence.status is Status.RUNNING]
        admitted, has_room = self._admit(budget, piece)
        self._ahead.load(has_room, num_spare=len(self._running))
        self._overload.observe()
        return items + admitted

    def _plan_decodes(self) -> tuple[list[PlannedSequence], list[Sequence]]:
        """The next token of each sequence that decodes, and the sequences that prefill.

        What a step costs the scheduler is spent here and in `commit`, once for each sequence.
        """
        items: list[PlannedSequence] = []
        prefills: list[Sequence] = []
        budget, block_size = self._budget.num_tokens, self._kv_cache.block_size
        for sequence in list(self._running):
            start = sequence.num_computed
            if len(sequence.token_ids) - start > 1:
                prefills.append(sequence)
            elif len(items) < budget and sequence.status is Status.RUNNING:
                # Its blocks hold all known tokens but one that begins a block.
                if start % block_size == 0 and not self._grow(sequence):
                    continue
                slot = sequence.slot
                assert slot is not None
                items.append(PlannedSequence(sequence, start, 1, slot, True))
        return items, prefills

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
        if self._budget.is_long(sequence.num_to_compute):
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
        num_pages = self._kv_cache.blocks_needed(sequence.request_id, sequence.num_tokens)
        if num_pages == 0:
            return True
        make_room = self._reclaimer.make_room
        while not (make_room(num_pages, keep=self._ahead.wanted) or make_room(num_pages)):
            victim = self._victim()
            if len(self._running) == 1 and self._adapters.num_loading == 0:
                self._fail(sequence, too_large(sequence, self._kv_cache))
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        self._kv_cache.extend(sequence.request_id, sequence.num_tokens)
        return True

    def _victim(self) -> Sequence:
        """Who is preempted: the newest of the tenant that was served most, worst priority first."""
        return max(
            self._running,
            key=lambda s: (s.request.priority, self._counters[s.tenant], s.arrival),
        )

    def _admit(self, budget: int, piece: int) -> tuple[list[PlannedSequence], bool]:
        """Start waiting sequences; False beside them when one had to wait for pages or a slot."""
        items: list[PlannedSequence] = []
        while budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._next_admission()
            if sequence is None:
                break
            if self._find_room(sequence):
                items.append(self._start(sequence, budget, piece))
                budget -= self._budget.cost(items[-1])
                if sequence.num_preemptions == 0:
                    self._counters.charge_prompt(sequence, sequence.num_uncomputed)
            elif self._running or self._adapters.num_loading:
                return items, False
            else:
                self._fail(sequence, too_large(sequence, self._kv_cache))
        return items, True

    def _next_admission(self) -> Sequence | None:
        """The first that can run, unless one before it waits for its adapter to find room."""
        while (sequence := self._waiting.next()) and not self._ahead.is_ready(sequence):
            self._waiting.park(sequence)
        return None if sequence is None or self._ahead.holds_up(sequence) else sequence

    def _find_room(self, sequence: Sequence) -> bool:
        """Take the blocks that are cached of it, and make room for the rest, if that can be had.

        A page for each running sequence can still be had then, or admitting would soon mean
        preempting. A combination needs a slot, too. What the queue's front needs goes last.
        """
        cache, seq_id, num_tokens = self._kv_cache, sequence.request_id, sequence.num_tokens
        keys = sequence.block_keys(cache.block_size)
        keep = [image.digest for image in sequence.members]
        num_pages = cache.blocks_to_begin(keys, num_tokens) + len(self._running)
        if not self._reclaimer.has_room(num_pages, keep):
            return False
        image, wanted = sequence.request.adapter, self._ahead.wanted
        if image is not None and not self._reclaimer.make_slot(image, wanted):
            return False
        sequence.num_found = sequence.num_computed = cache.share(seq_id, keys, num_tokens)
        num_pages = cache.blocks_needed(seq_id, num_tokens)
        make_room = self._reclaimer.make_room
        return make_room(num_pages, wanted.union(keep)) or make_room(num_pages, keep)

    def _start(self, sequence: Sequence, budget: int, piece: int) -> PlannedSequence:
        image, adapters = sequence.request.adapter, self._adapters
        if image is not None and image.parts:
            slot = adapters.combine(image)
        else:
            slot = -1 if image is None else adapters.acquire(image.digest)
        assert slot is not None, "only a resident adapter's sequence is ready"
        self._kv_cache.extend(sequence.request_id, sequence.num_tokens)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_found
            self.num_cached_tokens += sequence.num_found
        self._waiting.admit(sequence)
        insort(self._running, sequence, key=lambda s: s.arrival)
        sequence.slot = slot
        sequence.status = Status.RUNNING
        return self._planned(sequence, budget, piece)

    # Sequences.

    def _advance(self, item: PlannedSequence) -> None:
        sequence, start, num_tokens, slot, _ = item
        assert sequence.num_computed == start
        sequence.num_computed = num_computed = start + num_tokens
        # The slot, not the request, says which adapter computed them.
        sequence.adapter_digest = None if slot < 0 else self._adapters.digest_of(slot)
        block_size = self._kv_cache.block_size
        if num_computed % block_size < num_tokens:  # a block is full
            digest = sequence.wanted_digest
            if sequence.adapter_digest == digest:
                keys = sequence.block_keys(block_size)
                self._kv_cache.publish(sequence.request_id, keys, num_computed, digest)

    def _accept(
        self, sequence: Sequence, token: SampledToken, events: list[TokenEvent | Finished]
    ) -> None:
        """Append a sequence's next token, and what it means for its client to `events`."""
        request, token_ids = sequence.request, sequence.token_ids
        sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
        self.num_generated_tokens += 1
        self._counters.charge_token(sequence)
        if len(token_ids) == num_prompt:
            self.num_prompt_tokens += num_prompt
        if token.token_id in sampling.stop_token_ids:
            events.append(self._finish(sequence, "stop", num_unseen=1))
            return
        token_ids.append(token.token_id)
        events.append(
            TokenEvent(
                request_id=request.request_id,
                token_ids=(token.token_id,),
                logprobs=None if token.logprobs is None else (token.logprobs,),
                num_cached_tokens=sequence.num_cached or 0,
                adapter_digest=sequence.adapter_digest,
            )
        )
        num_tokens = len(token_ids)
        if num_tokens >= self._max_context or num_tokens - num_prompt >= sampling.max_tokens:
            events.append(self._finish(sequence, "length"))

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

    def _fail(self, sequence: Sequence, fault: Fault) -> None:
        self._events.append(self._finish(sequence, "error", fault))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        fault: Fault | None = None,
        *,
        num_unseen: int = 0,
    ) -> Finished:
        """End a live sequence and return its one final event; `num_unseen` counts a stop token."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)
            self._ahead.give_up(sequence)
        sequence.status = Status.FINISHED
        del self._live[sequence.request_id]
        self._drains.leave(sequence)
        return final_event(sequence, reason, fault, num_unseen=num_unseen)

    # Adapters.

    def _settle_loads(self) -> bool:
        """Take in the loads that ended; whether there were any."""
        results = self._adapters.poll()
        for digest, error in results:
            if error is None:
                self._waiting.unpark(digest)
                continue
            for sequence in self._waiting.waiting_for(digest):
                self._fail(sequence, Fault(error, "adapter_load_failed"))
        self._settle_drains()
        return bool(results)

    def _settle_drains(self) -> None:
        if self._drains:
            dropped = self._drains.settle(self._adapters)
            for each in dropped:
                self._reclaimer.forget(each.digest)
            self._events.extend(dropped)
