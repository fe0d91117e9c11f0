"""A decode batch of fixed size says of its sequences what an eager step says, and pads the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import RankRows
from server.engine.batch import build
from server.engine.decode_batch import DecodeBatch
from server.engine.plan import PlannedSequence, StepPlan
from server.engine.request import Sampling, Submit
from server.engine.sequence import Sequence
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool

NUM_ROWS, MAX_CONTEXT, MAX_SPAN_ROWS = 5, 22, 70
ROWS = RankRows(torch.zeros(4, 8), torch.zeros(4, 1), torch.zeros(4, 1))
ADAPTERS = SimpleNamespace(rows=ROWS, max_span_rows=lambda slot: 10 * slot)

shares = st.tuples(st.integers(1, MAX_CONTEXT), st.integers(-1, 3))  # known tokens, slot
batches = st.lists(shares, min_size=1, max_size=NUM_ROWS)


class Place:
    """A decode batch, and the memory of the sequences that come into it."""

    def __init__(self, block_size: int) -> None:
        self.pool = PagePool(200, 16, torch.float32, "cpu")
        self.scratch_page = self.pool.set_aside()
        self.kv_cache = KVCache(self.pool, block_size)
        self.block_size = block_size
        self.batch = DecodeBatch(
            NUM_ROWS,
            MAX_CONTEXT,
            MAX_SPAN_ROWS,
            ROWS,
            self.pool.storage,
            self.scratch_page,
            block_size,
        )

    def plan(self, drawn: list[tuple[int, int]]) -> StepPlan:
        items = []
        for n, (num_known, slot) in enumerate(drawn):
            self.kv_cache.free(f"s{n}")
            self.kv_cache.extend(f"s{n}", num_known)
            request = Submit(
                request_id=f"s{n}",
                prompt_token_ids=tuple(range(100 * n, 100 * n + num_known)),
                sampling=Sampling(max_tokens=1),
            )
            items.append(PlannedSequence(Sequence(request, n), num_known - 1, 1, slot, True))
        items.sort(key=lambda item: item.slot)
        return StepPlan(tuple(items))

    def check(self, plan: StepPlan) -> None:
        """The used rows are those of the eager step; the others are padding."""
        step, used = self.batch.step, len(plan.items)
        eager = build(plan, self.kv_cache, ADAPTERS, self.pool.storage)
        for name in ("token_ids", "positions", "kv_slot"):
            assert getattr(step, name)[:used].tolist() == getattr(eager, name).tolist()
        assert step.adapters.token_slot[:used].tolist() == eager.adapters.token_slot.tolist()
        assert step.attention.context_len[:used].tolist() == eager.attention.context_len.tolist()
        for row, item in zip(step.attention.block_table, plan.items, strict=False):
            table = self.kv_cache.table(item.sequence.request_id)
            assert row[: len(table)].tolist() == list(table)
            assert (row[len(table) :] == self.scratch_page).all()
        self.check_padding(used)

    def check_padding(self, used: int) -> None:
        step = self.batch.step
        assert (step.adapters.token_slot[used:] == -1).all()
        assert (step.kv_slot[used:] == self.scratch_page * self.block_size).all()
        assert (step.attention.block_table[used:] == self.scratch_page).all()
        assert (step.attention.context_len[used:] == 1).all()
        assert (step.positions[used:] == 0).all()


@given(st.lists(batches, min_size=1, max_size=4), st.sampled_from([3, 4, 16]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_one_batch_after_the_other_is_loaded_whole(loaded, block_size):
    place = Place(block_size)
    place.check_padding(used=0)
    for drawn in loaded:
        plan = place.plan(drawn)
        place.batch.load(plan.items, place.kv_cache)
        place.check(plan)


def test_what_launches_depend_on_is_the_same_for_every_batch():
    place = Place(4)
    step = place.batch.step
    assert step.attention.block_table.shape == (NUM_ROWS, 6)
    assert step.attention.query_start.tolist() == list(range(NUM_ROWS + 1))
    assert step.attention.decode.tolist() == step.logit_rows.tolist() == list(range(NUM_ROWS))
    assert step.attention.prefill.tolist() == []
    assert (step.attention.max_query, step.attention.max_context) == (1, MAX_CONTEXT)
    index = step.adapters
    assert (index.num_base, index.max_segment, index.max_span_rows) == (0, 1, MAX_SPAN_ROWS)


def test_tensors_have_the_types_of_an_eager_step():
    place = Place(4)
    eager = build(place.plan([(3, -1), (9, 2)]), place.kv_cache, ADAPTERS, place.pool.storage)
    pairs = [*zip(place.batch.step[:4], eager[:4], strict=True)]
    for name in ("attention", "adapters"):
        pairs += zip(getattr(place.batch.step, name), getattr(eager, name), strict=True)
    for tensor, other in pairs:
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype == other.dtype
            assert tensor.is_contiguous()


def test_loading_does_not_wait_for_the_device(host_syncs):
    place = Place(4)
    plan = place.plan([(3, -1), (9, 2)])
    with host_syncs:
        place.batch.load(plan.items, place.kv_cache)
    assert host_syncs.seen == []


@pytest.mark.parametrize("num_known", [1, MAX_CONTEXT])
def test_the_shortest_and_the_longest_context_fit(num_known):
    place = Place(4)
    plan = place.plan([(num_known, 0)] * NUM_ROWS)
    place.batch.load(plan.items, place.kv_cache)
    place.check(plan)
