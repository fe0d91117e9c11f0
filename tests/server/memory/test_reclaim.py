"""What goes when pages run short: by value, enough or nothing, never what is in use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.memory.adapter_pool import AdapterPool
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PagePool
from server.memory.prefix_index import BlockKeys
from server.memory.reclaim import Reclaimer
from server.memory.residency import AdapterImage, AdapterPart, combination

BLOCK = 4
NUM_PAGES = 12


def image_of(digest: str, num_pages: int) -> AdapterImage:
    return AdapterImage(digest=digest, path=str(4 * num_pages))


class Memory(SimpleNamespace):
    """KV cache, adapters and their reclaimer over one pool, or over the two parts of it."""

    def load(self, digest: str, num_pages: int, num_uses: int = 0, **wishes) -> bool:
        has_begun = self.reclaimer.load(image_of(digest, num_pages), **wishes)
        if has_begun and digest in self.loader.pending:
            self.loader.finish(digest)
            self.adapters.poll()
        for _ in range(num_uses):
            self.adapters.acquire(digest)
            self.adapters.release(digest)
        self.check()
        return has_begun

    def run(self, seq_id: str, tokens, digest: str | None = None, *, end: bool = True) -> int:
        """One sequence, from its admission to its end; how many of its tokens were cached."""
        keys = BlockKeys("", digest).of(tokens, BLOCK)
        num_cached = self.kv_cache.share(seq_id, keys, len(tokens))
        self.kv_cache.extend(seq_id, len(tokens))
        self.kv_cache.publish(seq_id, keys, len(tokens), digest)
        if end:
            self.kv_cache.free(seq_id)
        self.check()
        return num_cached

    def resident(self) -> set[str]:
        return {adapter.digest for adapter in self.adapters.report()}

    def check(self) -> None:
        pools = {self.kv_cache.prefixes.pool, self.adapters.pool}
        for part in (*pools, self.kv_cache, self.adapters, self.reclaimer):
            part.check()
        used = self.kv_cache.num_pages + self.kv_cache.num_cached_pages + self.adapters.num_pages
        assert used + sum(pool.num_free for pool in pools) == NUM_PAGES


@pytest.fixture(scope="session")
def memory_of(layout, make_loader):
    def make(
        *,
        num_slots: int = 8,
        compute_seconds: float = 1.0,
        load_seconds: float = 1.0,
        num_kv_pages: int | None = None,
    ) -> Memory:
        pool = PagePool(NUM_PAGES, layout.page_elements, torch.float32, "cpu")
        kv_pool, adapter_pool = (pool, pool) if num_kv_pages is None else pool.split(num_kv_pages)
        loader = make_loader()
        adapters = AdapterPool(
            adapter_pool, num_slots, 64, layout, loader=loader, page_seconds=load_seconds
        )
        kv_cache = KVCache(kv_pool, BLOCK, page_seconds=compute_seconds)
        reclaimer = Reclaimer(kv_cache, adapters)
        return Memory(
            pool=kv_pool, loader=loader, adapters=adapters, kv_cache=kv_cache, reclaimer=reclaimer
        )

    return make


@pytest.fixture
def memory(memory_of) -> Memory:
    return memory_of()


def test_room_that_is_there_costs_nothing(memory):
    memory.load("a", 4)
    assert memory.reclaimer.make_room(8)
    assert memory.resident() == {"a"}


def test_evicts_the_least_valuable_unpinned_adapter(memory):
    memory.load("often", 3, num_uses=5)
    memory.load("rarely", 3, num_uses=1)
    memory.load("in-use", 3)
    memory.load("sometimes", 3, num_uses=2)
    memory.adapters.acquire("in-use")
    assert memory.reclaimer.make_room(1)
    assert memory.resident() == {"often", "in-use", "sometimes"}
    assert memory.adapters.num_evictions == 1


def test_evicts_nothing_when_that_would_not_make_enough_room(memory):
    memory.load("pinned", 6)
    memory.load("idle", 3)
    memory.run("s", range(8))
    memory.adapters.acquire("pinned")
    assert memory.reclaimer.num_reclaimable() == 5
    assert not memory.reclaimer.make_room(7)
    assert not memory.reclaimer.load(image_of("new", 7))
    assert memory.resident() == {"pinned", "idle"}
    assert memory.kv_cache.num_cached_pages == 2
    assert memory.reclaimer.make_room(6)
    memory.check()


def test_kept_adapters_are_spared(memory):
    for digest in "abcd":
        memory.load(digest, 3)
    assert not memory.load("new", 3, keep=set("abcd"))
    assert memory.load("new", 3, keep={"a", "b", "d"})
    assert memory.resident() == {"a", "b", "d", "new"}
    assert memory.reclaimer.num_reclaimable(keep={"a", "b"}) == 6
    assert not memory.reclaimer.make_room(7, keep={"a", "b"})


def test_a_load_leaves_the_spare_pages_to_be_had(memory):
    memory.load("a", 6)
    memory.adapters.acquire("a")
    memory.run("s", range(8))
    assert not memory.load("b", 4, num_spare=3)
    assert memory.load("b", 4, num_spare=2)
    assert memory.kv_cache.num_cached_pages == 2, "nothing is evicted before its page is needed"
    assert memory.reclaimer.make_room(2, keep={"b"})


def test_a_slot_is_made_free_by_the_least_valuable_adapter(memory_of):
    memory = memory_of(num_slots=2)
    memory.load("often", 1, num_uses=3)
    memory.load("rarely", 1)
    memory.run("s", range(8))
    assert memory.load("new", 1)
    assert memory.resident() == {"often", "new"}
    assert memory.kv_cache.num_cached_pages == 2, "it was no page that was short"
    memory.adapters.acquire("often")
    memory.adapters.acquire("new")
    assert not memory.load("other", 1)


def test_what_can_never_be_loaded_is_reported_and_evicts_nothing(memory):
    memory.load("a", 6)
    assert memory.reclaimer.load(image_of("huge", NUM_PAGES + 1))
    ((digest, error),) = memory.adapters.poll()
    assert digest == "huge"
    assert "pool has 12" in error
    assert memory.resident() == {"a"}


def test_prefixes_that_never_came_again_go_before_adapters(memory):
    memory.load("a", 4)
    memory.run("s", range(20))
    memory.run("t", range(50, 58))
    assert memory.reclaimer.make_room(7)
    assert memory.resident() == {"a"}
    assert memory.kv_cache.num_cached_pages == 1


@pytest.mark.parametrize(
    ("compute_seconds", "load_seconds", "survivor"), [(9.0, 1.0, "prefix"), (1.0, 9.0, "adapter")]
)
def test_what_is_cheaper_to_bring_back_goes_first(
    memory_of, compute_seconds, load_seconds, survivor
):
    memory = memory_of(compute_seconds=compute_seconds, load_seconds=load_seconds)
    memory.load("a", 6, num_uses=1)
    assert [memory.run("s", range(21)), memory.run("s", range(21))] == [0, 20]
    assert memory.reclaimer.make_room(2)
    assert (memory.resident() == {"a"}) == (survivor == "adapter")
    assert (memory.kv_cache.num_cached_pages == 5) == (survivor == "prefix")


def test_what_was_of_use_long_ago_goes_at_last_though_it_was_used_often(memory):
    memory.load("old", 4, num_uses=5)
    for i in range(20):
        assert memory.load(f"new{i}", 4, num_uses=1)
    assert "old" not in memory.resident()


def test_an_adapter_takes_its_cached_prefixes_with_it(memory):
    memory.load("a", 3)
    memory.load("b", 3, num_uses=9)
    for digest in ("a", "b"):
        for _ in range(3):
            memory.run("s", range(9), digest)
    # Its blocks are worth more than the adapter itself: they go all the same.
    assert memory.reclaimer.make_room(3)
    assert memory.resident() == {"b"}
    assert memory.kv_cache.prefixes.digests == {"b"}
    assert memory.run("s", range(9), "b") == 8


def test_an_adapter_that_left_is_forgotten_with_its_prefixes(memory):
    memory.load("a", 3)
    memory.run("s", range(9), "a")
    assert memory.adapters.drop("a") is not None
    memory.reclaimer.forget("a")
    memory.check()
    assert memory.pool.num_free == NUM_PAGES


def test_check_finds_prefixes_of_an_adapter_that_is_gone(memory):
    memory.load("a", 3)
    memory.run("s", range(9), "a")
    memory.adapters.drop("a")
    with pytest.raises(AssertionError, match="adapter that is gone"):
        memory.reclaimer.check()


def test_with_a_split_pool_each_side_gives_up_its_own_pages(memory_of):
    memory = memory_of(num_kv_pages=6)
    memory.load("a", 6)
    memory.run("s", range(20))
    assert memory.reclaimer.make_room(6)
    assert not memory.reclaimer.make_room(7)
    assert memory.resident() == {"a"}
    memory.run("s", range(20))
    assert memory.load("b", 6, num_spare=3), "what it spares is on the other side"
    assert memory.resident() == {"b"}
    assert memory.kv_cache.num_cached_pages == 5


def mix_of(**weights: float) -> AdapterImage:
    return combination(AdapterPart(image_of(d, 1), weight) for d, weight in weights.items())


def test_a_slot_for_a_combination_costs_the_least_valuable_adapter_that_is_no_member(memory_of):
    memory = memory_of(num_slots=4)
    for digest, num_uses in (("a", 0), ("b", 0), ("wanted", 1), ("other", 2)):
        memory.load(digest, 1, num_uses=num_uses)
    mix = mix_of(a=0.5, b=0.5)
    assert memory.reclaimer.make_slot(mix, {"wanted"})
    assert memory.resident() == {"a", "b", "wanted"}
    assert memory.reclaimer.make_slot(mix)
    assert memory.resident() == {"a", "b", "wanted"}, "one is free already"
    assert memory.adapters.combine(mix) is not None
    assert memory.reclaimer.make_slot(mix), "it has one"
    memory.check()


def test_what_is_wanted_gives_its_slot_before_a_combination_waits(memory_of):
    memory = memory_of(num_slots=3)
    for digest in ("a", "b", "wanted"):
        memory.load(digest, 1)
    mix = mix_of(a=0.5, b=0.5)
    memory.adapters.acquire("wanted")
    assert not memory.reclaimer.make_slot(mix), "in use"
    memory.adapters.release("wanted")
    assert memory.reclaimer.make_slot(mix, {"wanted"})
    assert memory.resident() == {"a", "b"}


def test_prefixes_of_a_combination_outlive_it_and_go_by_their_value(memory):
    mix = mix_of(a=0.5, b=0.5)
    for digest in ("a", "b"):
        memory.load(digest, 1)
    memory.adapters.combine(mix)
    memory.run("s", range(9), mix.digest)
    memory.adapters.release(mix.digest)
    memory.check()
    memory.adapters.evict("a")
    assert memory.run("s", range(9), mix.digest) == 8
    assert memory.reclaimer.make_room(NUM_PAGES)
    assert memory.kv_cache.num_cached_pages == 0


def test_making_room_looks_at_what_goes_and_not_at_all_that_stays(memory_of, monkeypatch):
    memory = memory_of()
    for i in range(3):
        memory.run("s", range(100 * i, 100 * i + 16))
    offered = []
    put = memory.kv_cache.prefixes._leaves.put
    monkeypatch.setattr(
        memory.kv_cache.prefixes._leaves, "put", lambda *args: offered.append(args) or put(*args)
    )
    assert memory.reclaimer.make_room(2)
    assert len(offered) == 2, "each block that went made way for the one before it"


ADAPTERS = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8}
TOKENS = ([1, 2, 3, 4, 5, 6, 7] * 6, [1, 2, 3, 4, 5, 6, 7] + [8, 9] * 12)

MIXES = {
    mix.digest: mix
    for weights in ({"a": 0.5, "b": 2.0}, {"a": 2.0, "b": 0.5}, {"c": 0.5})
    for mix in [combination(AdapterPart(image_of(d, ADAPTERS[d]), w) for d, w in weights.items())]
}

names = st.sampled_from(list(ADAPTERS))
keep = st.sets(names, max_size=2)
operation = st.one_of(
    st.tuples(
        st.just("begin"),
        st.sampled_from([None, *ADAPTERS, *MIXES]),
        st.integers(0, 1),
        st.integers(1, 30),
        st.sampled_from(["", "", "salt"]),
    ),
    st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("load"), names, keep, st.integers(0, 2)),
    st.tuples(st.just("finish"), st.booleans()),
    st.tuples(st.just("room"), st.integers(0, NUM_PAGES), keep),
    st.tuples(st.just("drop"), names),
)


class Walk:
    """Applies operations as a scheduler would, and holds what every sequence should have."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.sequences: list[SimpleNamespace] = []
        self.content: dict[int, object] = {}  # page → what was computed into it
        self.number = 0

    def begin(self, digest, text, num_tokens, salt) -> None:
        cache, reclaimer = self.memory.kv_cache, self.memory.reclaimer
        tokens = TOKENS[text][:num_tokens]
        keys = BlockKeys(salt, digest).of(tokens, BLOCK)
        mix = MIXES.get(digest)
        spared = self.members(digest)
        if not all(self.memory.adapters.is_resident(each) for each in spared):
            return
        if not reclaimer.has_room(cache.blocks_to_begin(keys, num_tokens), spared):
            return
        if mix is not None and not reclaimer.make_slot(mix):
            return
        seq_id = f"s{self.number}"
        self.number += 1
        num_cached = cache.share(seq_id, keys, num_tokens)
        assert num_cached < num_tokens
        assert reclaimer.make_room(cache.blocks_needed(seq_id, num_tokens), spared), "as promised"
        cache.extend(seq_id, num_tokens)
        if digest is not None:
            adapters = self.memory.adapters
            slot = adapters.acquire(digest) if mix is None else adapters.combine(mix)
            assert adapters.digest_of(slot) == digest
        origin = (salt, digest, tuple(tokens))
        self.sequences.append(
            SimpleNamespace(id=seq_id, origin=origin, keys=keys, num_computed=num_cached)
        )

    def members(self, digest) -> list[str]:
        if digest in MIXES:
            return [member.digest for member in MIXES[digest].members]
        return [] if digest is None else [digest]

    def compute(self, index, num_tokens) -> None:
        if not self.sequences:
            return
        sequence = self.sequences[index % len(self.sequences)]
        _, digest, tokens = sequence.origin
        table = self.memory.kv_cache.table(sequence.id)
        stop = min(len(tokens), sequence.num_computed + num_tokens)
        for i in range(sequence.num_computed // BLOCK, -(-stop // BLOCK)):
            self.content[table[i]] = self.identity(sequence, i, stop)
        sequence.num_computed = stop
        self.memory.kv_cache.publish(sequence.id, sequence.keys, stop, digest)

    def identity(self, sequence, block: int, stop: int) -> object:
        salt, digest, tokens = sequence.origin
        return salt, digest, tokens[: min(stop, (block + 1) * BLOCK)]

    def end(self, index) -> None:
        if not self.sequences:
            return
        sequence = self.sequences.pop(index % len(self.sequences))
        self.memory.kv_cache.free(sequence.id)
        if sequence.origin[1] is not None:
            self.memory.adapters.release(sequence.origin[1])

    def load(self, digest, keep, num_spare) -> None:
        self.memory.reclaimer.load(
            image_of(digest, ADAPTERS[digest]), keep=keep, num_spare=num_spare
        )

    def finish(self, succeeds) -> None:
        for digest in list(self.memory.loader.pending)[:1]:
            (self.memory.loader.finish if succeeds else self.memory.loader.fail)(digest)
            self.memory.adapters.poll()

    def room(self, num_pages, keep) -> None:
        reclaimer, pool = self.memory.reclaimer, self.memory.pool
        before = pool.num_free
        kept = {d for d in keep if self.memory.adapters.is_resident(d)}
        could = before + reclaimer.num_reclaimable(keep)
        assert reclaimer.make_room(num_pages, keep) == (num_pages <= could)
        assert pool.num_free >= num_pages if num_pages <= could else pool.num_free == before
        assert all(self.memory.adapters.is_resident(digest) for digest in kept)

    def drop(self, digest) -> None:
        if self.memory.adapters.drop(digest) is not None:
            self.memory.reclaimer.forget(digest)

    def check(self) -> None:
        self.memory.check()
        for sequence in self.sequences:
            table = self.memory.kv_cache.table(sequence.id)
            for i in range(-(-sequence.num_computed // BLOCK)):
                expected = self.identity(sequence, i, sequence.num_computed)
                assert self.content[table[i]] == expected, "keys of something else"
            for digest in self.members(sequence.origin[1]):
                assert self.memory.adapters.is_resident(digest), "evicted in use"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(operation, max_size=60), st.sampled_from([None, None, 5]), st.integers(1, 3))
def test_every_sequence_reads_its_own_keys_and_every_page_comes_back(
    memory_of, operations, num_kv_pages, num_slots
):
    memory = memory_of(num_slots=num_slots, num_kv_pages=num_kv_pages, compute_seconds=3.0)
    walk = Walk(memory)
    for kind, *values in operations:
        getattr(walk, kind)(*values)
        walk.check()
    while walk.sequences:
        walk.end(0)
    while memory.loader.pending:
        walk.finish(True)
    assert memory.reclaimer.make_room(memory.pool.num_pages)
    walk.check()
    assert memory.pool.num_free == memory.pool.num_pages
