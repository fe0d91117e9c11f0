"""The counters of a sequence follow from its tokens."""

from __future__ import annotations

import pytest

from server.engine.request import AdapterImage, Sampling, Submit
from server.engine.sequence import Sequence, Status
from server.memory.prefix_index import BlockKeys


@pytest.fixture
def sequence() -> Sequence:
    request = Submit(
        request_id="r",
        prompt_token_ids=(5, 6, 7),
        sampling=Sampling(max_tokens=4),
        adapter=AdapterImage(digest="d", path="p"),
        cache_salt="salt",
    )
    return Sequence(request, arrival=0)


def test_starts_as_its_prompt_with_nothing_computed(sequence):
    assert sequence.token_ids == [5, 6, 7]
    assert (sequence.num_prompt, sequence.num_generated, sequence.num_uncomputed) == (3, 0, 3)
    assert sequence.status is Status.WAITING
    assert sequence.slot is None
    assert sequence.wanted_digest == "d"
    sequence.check()


def test_counts_generated_and_uncomputed_tokens_apart(sequence):
    sequence.token_ids.append(9)
    sequence.num_computed = 3
    assert (sequence.num_tokens, sequence.num_generated, sequence.num_uncomputed) == (4, 1, 1)


def test_what_was_found_in_the_prefix_cache_is_not_computed(sequence):
    sequence.num_found = sequence.num_computed = 2
    sequence.token_ids += [9, 9]
    assert (sequence.num_to_compute, sequence.num_uncomputed) == (3, 3)
    sequence.num_computed = 4
    assert (sequence.num_to_compute, sequence.num_uncomputed) == (3, 1)


def test_its_block_keys_are_those_of_its_salt_adapter_and_tokens(sequence):
    assert list(sequence.block_keys(2)) == list(BlockKeys("salt", "d").of([5, 6], 2))
    sequence.token_ids.append(9)
    assert list(sequence.block_keys(2)) == list(BlockKeys("salt", "d").of([5, 6, 7, 9], 2))


def test_its_tokens_are_its_own(sequence):
    sequence.token_ids.append(9)
    assert sequence.request.prompt_token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": 0},
        {"num_computed": 1},
        {"status": Status.RUNNING},
        {"status": Status.RUNNING, "slot": 0, "num_computed": 3},
        {"token_ids": [5, 6]},
    ],
)
def test_check_finds_a_state_that_cannot_be(sequence, changes):
    for name, value in changes.items():
        setattr(sequence, name, value)
    with pytest.raises(AssertionError):
        sequence.check()
