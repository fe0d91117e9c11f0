"""Cases ask every adapter that they are named after, and their work is what they ask."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter

import pytest

from bench.closed_cases import cases, one_batch, work_of
from server.engine.request import AdapterImage

OPTIONS = argparse.Namespace(
    requests_per_client=2, adapters=(1, 8, 32, 64), rank=16, prompt=128, tokens=64
)
RANKS = (8, 16, 32, 64) * 16
PLAIN, MIXED = (
    [AdapterImage(f"{kind}-{i}", f"{kind}-{i}") for i in range(64)] for kind in ("plain", "mixed")
)


def names(concurrency):
    return [case.name for case in cases(OPTIONS, concurrency, PLAIN, MIXED, RANKS)]


def test_a_case_has_no_more_adapters_than_requests():
    assert names(1) == ["base", "1 x r16", "2 mixed"]
    assert names(8) == ["base", "1 x r16", "8 x r16", "16 mixed"]
    assert names(32) == ["base", "1 x r16", "8 x r16", "32 x r16", "64 x r16", "64 mixed"]


class EchoSession:
    """Answers in 100 ms, and remembers whom it was asked for."""

    def __init__(self):
        self.asked = Counter()

    def prompts(self, num_prompts, num_tokens):
        return [[0] * num_tokens] * num_prompts

    def asking(self, texts, images, num_output):
        async def ask(i, arrived):
            assert len(texts[i]) == OPTIONS.prompt
            self.asked[images[i]] += 1
            await asyncio.sleep(0.1)
            arrived()
            return num_output

        return ask


@pytest.mark.parametrize("number", range(6))
def test_a_run_asks_every_adapter_of_the_case_equally(number, virtual_run):
    case, session = cases(OPTIONS, 32, PLAIN, MIXED, RANKS)[number], EchoSession()
    virtual_run(one_batch(session, case, 32, OPTIONS))
    images = case.images or (None,)
    assert session.asked == dict.fromkeys(images, 64 // len(images))


def test_work_is_counted_from_the_case():
    base, *_, mixed = cases(OPTIONS, 32, PLAIN, MIXED, RANKS)
    assert (work_of(base, 32, OPTIONS).num_adapters, work_of(base, 32, OPTIONS).mean_rank) == (0, 0)
    work = work_of(mixed, 32, OPTIONS)
    assert (work.num_requests, work.num_adapters, work.mean_rank) == (64, 64, 30)
