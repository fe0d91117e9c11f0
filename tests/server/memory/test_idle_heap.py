"""The least valuable key is found, whatever was put in and withdrawn before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.memory.idle_heap import IdleHeap


def drained(heap: IdleHeap[str]) -> list[str]:
    keys = []
    while (least := heap.least()) is not None:
        keys.append(least[1])
        heap.discard(least[1])
    return keys


def test_the_lowest_priority_comes_first_and_of_equal_ones_the_oldest():
    heap: IdleHeap[str] = IdleHeap()
    for key, priority in (("b", 2.0), ("a", 1.0), ("c", 2.0), ("d", 0.5)):
        heap.put(key, priority)
    assert heap.least() == (0.5, "d")
    assert drained(heap) == ["d", "a", "b", "c"]


def test_the_last_priority_counts():
    heap: IdleHeap[str] = IdleHeap()
    heap.put("a", 1.0)
    heap.put("b", 2.0)
    heap.put("a", 3.0)
    assert (len(heap), "a" in heap) == (2, True)
    assert drained(heap) == ["b", "a"]
    assert "a" not in heap


def test_spared_keys_are_passed_and_stay():
    heap: IdleHeap[str] = IdleHeap()
    for i, key in enumerate("abc"):
        heap.put(key, float(i))
    assert heap.least({"a", "b"}) == (2.0, "c")
    assert heap.least({"a", "b", "c"}) is None
    assert drained(heap) == ["a", "b", "c"]


def test_a_key_that_comes_and_goes_for_ever_takes_no_more_memory():
    heap: IdleHeap[str] = IdleHeap()
    heap.put("quiet", 0.0)
    for i in range(5000):
        heap.put("busy", float(i))
        heap.discard("busy")
    assert len(heap._heap) < 100
    assert drained(heap) == ["quiet"]


operation = st.tuples(st.sampled_from(["put", "discard", "least"]), st.sampled_from("abcdef"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(operation, st.integers(0, 3), st.sets(st.sampled_from("abcdef")))))
def test_it_finds_what_a_search_through_all_finds(operations):
    heap: IdleHeap[str] = IdleHeap()
    model: dict[str, float] = {}
    for (kind, key), priority, spared in operations:
        if kind == "put":
            heap.put(key, priority)
            model.pop(key, None)  # put anew: behind those of equal priority
            model[key] = priority
        elif kind == "discard":
            heap.discard(key)
            model.pop(key, None)
        left = {k: p for k, p in model.items() if k not in spared}
        expected = min(left, key=left.__getitem__, default=None)
        found = heap.least(spared)
        assert found == (None if expected is None else (left[expected], expected))
        assert len(heap) == len(model)
        heap.check()
