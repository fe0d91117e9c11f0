"""What a long prompt does to others' tokens, on a scripted engine whose times are known."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from bench.long_prompt import long_prompt_effect

QUIET, SLOW = 0.01, 0.03


class ScriptedSession:
    """Streams that get a token every 10 ms, every 30 ms while a long prompt is computed."""

    def __init__(self, max_context):
        self.engine = SimpleNamespace(started=SimpleNamespace(max_context=max_context))
        self._gap = QUIET

    def prompts(self, num_prompts, num_tokens):
        return [[0] * num_tokens] * num_prompts

    def asking(self, texts, images, num_output):
        async def ask(_, arrived):
            for _ in range(num_output):
                await asyncio.sleep(self._gap)
                arrived()
            return num_output

        return ask

    async def answer(self, prompt, image, num_tokens):
        self._gap = SLOW
        await asyncio.sleep(10 * SLOW)
        self._gap = QUIET


@pytest.fixture
def effect(virtual_run):
    def measured(session, **sizes):
        return virtual_run(long_prompt_effect(session, num_prompt=8, rounds=2, **sizes))

    return measured


def test_the_ratio_is_of_the_gaps_while_it_is_computed_to_those_before(effect):
    found = effect(ScriptedSession(4096), num_streams=3, long_prompt=512)
    assert found["quiet_p99_seconds"] == pytest.approx(QUIET, rel=1e-3)
    assert found["disturbed_p99_seconds"] == pytest.approx(SLOW, rel=1e-3)
    assert found["ratio"] == pytest.approx(3, rel=1e-2)
    assert found["first_token_seconds"] == pytest.approx(10 * SLOW)


def test_a_prompt_beyond_the_context_is_refused_with_the_remedy(effect):
    with pytest.raises(ValueError, match=r"600 tokens .* context of 512.*--long-prompt"):
        effect(ScriptedSession(512), num_streams=1, long_prompt=600)


def test_streams_that_end_too_early_are_no_measurement(effect):
    with pytest.raises(RuntimeError, match="ended after 32 tokens, too early"):
        effect(ScriptedSession(40), num_streams=2, long_prompt=30)
