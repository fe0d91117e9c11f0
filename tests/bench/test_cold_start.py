"""Cold starts on a scripted engine of one slot: every tier is reached, and told apart."""

from __future__ import annotations

import argparse
import asyncio
from types import SimpleNamespace

import pytest

from bench import cold_start
from bench.cold_start import TIERS, cold_settings, cold_starts
from bench.stored_images import StoredImage
from server.engine.request import AdapterImage

QUIET = 0.01
SECONDS = {None: 0.4, "host": 0.2, "resident": 0.1}  # of a first token, by the adapter's state


class ScriptedSession:
    """Streams with a token every 10 ms; a slot, and host memory for what had it."""

    def __init__(self, *, keeps_in_host=True):
        self.states = {}
        self.first_requests = []
        self.engine = SimpleNamespace(
            started=SimpleNamespace(max_context=4096), drop=self._drop, load=None
        )
        self._evicted = "host" if keeps_in_host else None

    async def _drop(self, digest):
        self.states.pop(digest, None)
        self._report()

    def _report(self):
        adapters = [
            SimpleNamespace(digest=digest, state=state)
            for digest, state in self.states.items()
            if state is not None
        ]
        self.engine.load = SimpleNamespace(adapters=adapters)

    def prompts(self, num_prompts, num_tokens):
        return [[0] * num_tokens] * num_prompts

    def asking(self, texts, images, num_output):
        async def ask(_, arrived):
            for _ in range(num_output):
                await asyncio.sleep(QUIET)
                arrived()
            return num_output

        return ask

    async def answer(self, prompt, image, num_tokens):
        state = self.states.get(image.digest)
        if len(prompt) > 1:
            self.first_requests.append((image.digest, state))
        await asyncio.sleep(SECONDS[state])
        self.states = dict.fromkeys(self.states, self._evicted)
        self.states[image.digest] = "resident"
        self._report()


def stored(tmp_path, *ranks):
    found = []
    for i, rank in enumerate(ranks):
        path = tmp_path / str(i)
        path.write_bytes(b"image")
        found.append(StoredImage(AdapterImage(f"digest-{i}", str(path)), rank, 2 * rank))
    return SimpleNamespace(stored=found)


def measured(session, fleet, ranks=(16,)):
    options = argparse.Namespace(rounds=2, cold_ranks=ranks, cold_prompt=8, streams=2)
    return cold_starts(session, fleet, options)


def test_a_row_for_each_rank_and_tier_whose_first_token_takes_as_long_as_its_tier(
    tmp_path, virtual_run
):
    rows = virtual_run(measured(ScriptedSession(), stored(tmp_path, 16, 64, 8), (16, 64)))
    assert [(row["rank"], row["tier"]) for row in rows] == [(r, t) for r in (16, 64) for t in TIERS]
    first = [row["first_token_seconds"]["median"] for row in rows[:4]]
    assert first == pytest.approx([0.4, 0.4, 0.2, 0.1])
    assert rows[0]["gap_ratio"]["median"] == pytest.approx(1.0, rel=1e-3)


def test_each_round_has_another_adapter_of_the_rank(tmp_path, virtual_run):
    session = ScriptedSession()
    virtual_run(measured(session, stored(tmp_path, 16, 8, 16, 16)))
    asked = [digest for digest, _ in session.first_requests[:: len(TIERS)]]
    assert asked == ["digest-3", "digest-0", "digest-2"]  # of the warm-up and two rounds


def test_only_the_disk_tier_takes_the_file_out_of_the_page_cache(
    tmp_path, virtual_run, monkeypatch
):
    forgotten = []
    monkeypatch.setattr(cold_start, "forget_cached", forgotten.append)
    fleet = stored(tmp_path, 16, 8)
    virtual_run(measured(ScriptedSession(), fleet))
    assert forgotten == [fleet.stored[0].image] * 3  # of the warm-up and two rounds


def test_an_adapter_that_is_not_in_its_tier_is_no_measurement(tmp_path, virtual_run):
    with pytest.raises(RuntimeError, match="should be in tier 'host', and the engine says None"):
        virtual_run(measured(ScriptedSession(keeps_in_host=False), stored(tmp_path, 16, 8)))


def test_a_rank_that_is_not_stored_is_refused_with_the_remedy(tmp_path, virtual_run):
    with pytest.raises(ValueError, match="no stored adapter has rank 32: add it to --ranks"):
        virtual_run(measured(ScriptedSession(), stored(tmp_path, 16, 8), (32,)))


def test_the_engine_has_one_slot_and_host_memory_for_some_of_the_largest(tmp_path):
    spec = SimpleNamespace(page_bytes=10)
    found = cold_settings(spec, stored(tmp_path, 16, 64))
    assert found == {"max_adapters": 1, "host_memory_bytes": 4 * 128 * 10}
