"""The tensors of a step say, token by token, what the plan, the block tables and the slots say."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import RankRows
from server.engine.batch import build
from server.engine.plan import PlannedSequence, StepPlan
from server.engine.request import Sampling, Submit
from server.engine.sequence import Sequence
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool

NUM_PAGES = 64
SPAN_ROWS = {0: 3, 1: 64, 2: 17, 3: 0}


@dataclass
class Slots:
    """As much of an adapter pool as a batch reads: the row table, and the widest span of a slot."""

    rows: RankRows

    def max_span_rows(self, slot: int) -> int:
        return SPAN_ROWS[slot]


@dataclass
class Share:
    """One sequence's share of a step: known tokens, those computed before, those to compute."""

    num_known: int
    start: int
    num_tokens: int
    slot: int


SLOTS = Slots(RankRows(torch.zeros(4, 8), torch.zeros(4, 1), torch.zeros(4, 1)))


def step_of(shares: list[Share], block_size: int):
    """The built step and what it was built from; pages are handed out in a scattered order."""
    pool = PagePool(NUM_PAGES, 16, torch.float32, "cpu")
    pages = pool.allocate(NUM_PAGES)
    pool.free(pages[::3] + pages[2::3] + pages[1::3])
    kv_cache = KVCache(pool, block_size)
    items = []
    for n, share in enumerate(shares):
        prompt = tuple(100 * n + i for i in range(share.num_known))
        request = Submit(
            request_id=f"r{n}", prompt_token_ids=prompt, sampling=Sampling(max_tokens=1)
        )
        # In turns, so that the tables of two sequences are interleaved.
        kv_cache.extend(f"r{n}", max(1, share.start))
        items.append(
            PlannedSequence(
                Sequence(request, n),
                share.start,
                share.num_tokens,
                share.slot,
                samples=share.start + share.num_tokens == share.num_known,
            )
        )
    for item in items:
        kv_cache.extend(item.sequence.request_id, item.sequence.num_tokens)
    items.sort(key=lambda item: item.slot)
    step = build(StepPlan(tuple(items)), kv_cache, SLOTS, pool.storage)
    return step, items, kv_cache


def check_step(shares: list[Share], block_size: int) -> None:
    """The oracle: one token after the other."""
    step, items, kv_cache = step_of(shares, block_size)
    token = 0
    logit_rows = []
    for n, item in enumerate(items):
        assert step.attention.query_start[n] == token
        for position in range(item.start, item.start + item.num_tokens):
            table = kv_cache.table(item.sequence.request_id)
            page, offset = table[position // block_size], position % block_size
            assert step.token_ids[token] == item.sequence.token_ids[position]
            assert step.positions[token] == position
            assert step.kv_slot[token] == page * block_size + offset
            assert step.adapters.token_slot[token] == item.slot
            token += 1
        stop = item.start + item.num_tokens
        assert step.attention.context_len[n] == stop
        for block in range(-(-stop // block_size)):
            page = kv_cache.table(item.sequence.request_id)[block]
            assert step.attention.block_table[n, block] == page
        if stop == item.sequence.num_tokens:
            logit_rows.append(token - 1)
    assert len(step.token_ids) == len(step.positions) == len(step.kv_slot) == token
    assert step.attention.query_start[-1] == token
    assert step.logit_rows.tolist() == logit_rows
    check_kinds(step.attention, items)
    check_segments(step.adapters, items)


def check_kinds(attention, items) -> None:
    counts = [item.num_tokens for item in items]
    assert attention.decode.tolist() == [n for n, count in enumerate(counts) if count == 1]
    assert attention.prefill.tolist() == [n for n, count in enumerate(counts) if count > 1]
    assert attention.max_query == max(counts)
    assert attention.max_context == max(item.start + item.num_tokens for item in items)


def check_segments(adapters, items) -> None:
    slots = [item.slot for item in items for _ in range(item.num_tokens)]
    used = sorted({slot for slot in slots if slot >= 0})
    assert adapters.segment_slot.tolist() == used
    assert adapters.segment_start.tolist() == [*(slots.index(slot) for slot in used), len(slots)]
    assert adapters.num_base == slots.count(-1)
    assert adapters.max_segment == max((slots.count(slot) for slot in used), default=0)
    assert adapters.max_span_rows == max((SPAN_ROWS[slot] for slot in used), default=0)


@st.composite
def some_shares(draw) -> list[Share]:
    shares = []
    for _ in range(draw(st.integers(1, 6))):
        num_known = draw(st.integers(1, 20))
        start = draw(st.integers(0, num_known - 1))
        num_tokens = draw(st.integers(1, num_known - start))
        shares.append(Share(num_known, start, num_tokens, draw(st.integers(-1, 3))))
    return shares


@given(some_shares(), st.sampled_from([3, 4, 16]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_token_of_a_mixed_step_is_where_plan_and_tables_say(shares, block_size):
    check_step(shares, block_size)


MIXED = [
    Share(num_known=9, start=0, num_tokens=9, slot=-1),  # a whole prompt
    Share(num_known=20, start=5, num_tokens=7, slot=2),  # a chunk inside a prompt
    Share(num_known=12, start=11, num_tokens=1, slot=0),  # a decode
    Share(num_known=6, start=5, num_tokens=1, slot=-1),
    Share(num_known=8, start=2, num_tokens=6, slot=0),  # the last chunk
]


def test_prefill_and_decode_of_base_and_adapters_share_a_step():
    check_step(MIXED, block_size=4)


def test_a_chunk_that_does_not_reach_the_last_token_wants_no_logits():
    step, _, _ = step_of([Share(20, 0, 8, 1)], 4)
    assert step.logit_rows.shape == (0,)


def test_a_prefill_chunk_of_one_token_is_read_as_a_decode():
    step, _, _ = step_of([Share(20, 8, 1, -1)], 4)
    assert step.attention.decode.tolist() == [0]
    assert step.attention.prefill.tolist() == []


def test_a_step_without_adapters_has_no_segments():
    step, _, _ = step_of([Share(3, 0, 3, -1), Share(4, 3, 1, -1)], 4)
    assert step.adapters.max_segment == step.adapters.max_span_rows == 0
    assert step.adapters.segment_start.tolist() == [4]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("token_ids", torch.int64), ("positions", torch.int32), ("kv_slot", torch.int64)],
)
def test_tensors_have_the_types_that_the_kernels_read(name, dtype):
    step, _, _ = step_of(MIXED, 4)
    assert getattr(step, name).dtype == dtype
    assert step.logit_rows.dtype == torch.int64
    for index in (step.attention, step.adapters):
        for tensor in index:
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype == torch.int32
                assert tensor.is_contiguous()
    assert step.rows is SLOTS.rows
