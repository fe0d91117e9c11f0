"""Which combinations are the same: one content with one weight each, in whatever order."""

from __future__ import annotations

import re

import msgspec
import pytest

from server.memory.residency import AdapterImage, AdapterPart, combination


def mix(**weights: float) -> AdapterImage:
    return combination(AdapterPart(AdapterImage(d, f"{d}.file"), w) for d, w in weights.items())


def test_the_order_of_the_members_does_not_matter():
    assert mix(a=0.7, b=0.3) == mix(b=0.3, a=0.7)


def test_a_digest_is_of_fixed_length_and_none_that_an_adapter_could_have():
    assert re.fullmatch(r"mix:[0-9a-f]{64}", mix(a=0.7, b=0.3).digest)


@pytest.mark.parametrize(
    "other",
    [
        {"a": 0.3, "b": 0.7},
        {"a": 0.7, "b": 0.30000000000000004},
        {"a": 0.7, "c": 0.3},
        {"a": 0.7},
        {"a": -0.7, "b": 0.3},
        {"a": 0.7, "b": 0.3, "c": 1.0},
    ],
)
def test_other_members_or_other_weights_are_another_combination(other):
    assert mix(**other).digest != mix(a=0.7, b=0.3).digest


def test_whole_numbers_are_the_same_weights_as_integers():
    assert mix(a=2, b=1).digest == mix(a=2.0, b=1.0).digest


def test_one_adapter_of_weight_1_is_that_adapter():
    image = AdapterImage("a", "a.file")
    assert combination([AdapterPart(image, 1.0)]) is image
    assert image.members == (image,)
    assert mix(a=0.5).members == (image,)
    assert mix(a=0.5).digest != "a"


def test_members_come_by_digest():
    assert [image.digest for image in mix(b=1.0, c=0.5, a=2.0).members] == ["a", "b", "c"]


def test_nothing_and_one_content_twice_are_no_combinations():
    image = AdapterImage("a", "a.file")
    with pytest.raises(AssertionError, match="base model"):
        combination([])
    with pytest.raises(AssertionError, match="one part"):
        combination([AdapterPart(image, 1.0), AdapterPart(image, 2.0)])


def test_a_combination_crosses_between_processes_as_it_is():
    image = mix(a=0.1, b=-0.3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(image), type=AdapterImage) == image
