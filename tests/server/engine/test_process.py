"""The engine process is put together in memory of any size that can serve, and says what it has."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

import kernels.reference
from server.config import Settings
from server.engine.process import _show_progress, build_engine, capture_for, divide, warm_up
from server.engine.request import Finished, Load, Sampling, Submit, TokenEvent
from server.engine.spec import engine_spec
from server.memory.adapter_pool import AdapterPool
from server.memory.page_pool import PageGeometry, PagePool
from server.model.config import ModelError
from server.model.decoder import Decoder
from server.model.source import ModelSource
from server.model.weights import load_model


class ListPost:
    """A mailbox of lists."""

    def __init__(self) -> None:
        self.inbox: list = []
        self.sent: list = []
        self.woken = threading.Event()

    def receive(self, wait: bool) -> list:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, messages) -> None:
        self.sent.extend(messages)

    def wake(self) -> None:
        self.woken.set()


@pytest.fixture
def spec_of(tiny_llama, monkeypatch):
    """spec_of(**settings): the tiny model; its kernels are the reference."""
    monkeypatch.setattr("server.engine.process.kernels_for", lambda device: kernels.reference)
    defaults = {"model": str(tiny_llama), "device": "cpu", "dtype": "float32"}
    return lambda **settings: engine_spec(Settings(**(defaults | settings)))


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_warming_up_fits_the_smallest_pool_and_touches_its_own_pages_only(tiny_llama, block_size):
    config, weights = load_model(ModelSource("tiny-llama", tiny_llama), torch.float32)
    decoder = Decoder(config, weights, kernels.reference, torch.device("cpu"), torch.float32)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    elements = PageGeometry(*shape, block_size).page_elements
    num_used = -(-2 // block_size)
    pool = PagePool(num_used + 1, elements, torch.float32, "cpu")
    pool.storage[num_used] = torch.nan
    adapters = AdapterPool(pool, 1, 8, config.layout(elements, "float32"))
    warm_up(decoder, pool, adapters, block_size)
    adapters.close()
    pool.check()
    assert pool.num_free == pool.num_pages
    assert pool.storage[num_used].isnan().all()
    kv = pool.storage[:num_used].view(num_used, config.num_layers, 2, block_size, -1)
    tokens = kv.transpose(1, 3).reshape(num_used * block_size, -1)
    assert (tokens[:2] != 0).any(dim=1).all(), "the kernels did not run"
    assert not tokens.isnan().any()


def test_cache_and_adapters_have_one_pool_unless_adapters_have_a_share():
    pool = PagePool(10, 8, torch.float32, "cpu")
    assert divide(pool, None) == (pool, pool)
    kv_pool, adapter_pool = divide(pool, 0.3)
    assert (kv_pool.num_pages, adapter_pool.num_pages) == (7, 3)
    for share in (0.01, 0.99):
        with pytest.raises(ModelError, match=f"adapter_memory_share {share} of 10 pages"):
            divide(pool, share)


def test_an_engine_with_a_share_for_adapters_counts_all_pages_and_bounds_the_context(spec_of):
    spec = spec_of(pool_bytes=1 << 18, block_size=8, adapter_memory_share=0.9, max_adapters=2)
    loop, started = build_engine(spec, ListPost())
    loop.close()
    assert started.num_pages == spec.num_pages()
    assert started.max_context <= 8 * round(0.1 * started.num_pages)


def test_an_engine_that_was_built_says_what_it_holds_and_serves(spec_of):
    spec = spec_of(pool_bytes=1 << 18, block_size=8, max_adapters=3, max_num_seqs=2)
    post = ListPost()
    loop, started = build_engine(spec, post)
    assert (started.num_pages, started.num_slots) == (spec.num_pages(), 3)
    assert (started.page_bytes, started.max_context) == (spec.page_bytes, 128)
    post.inbox = [
        Submit(
            request_id=request_id,
            prompt_token_ids=(1, 2, 3),
            sampling=Sampling(max_tokens=3, temperature=0.0),
        )
        for request_id in "abc"
    ]
    for _ in range(8):
        loop.turn()
    loop.close()
    ends = {m.request_id: m.reason for m in post.sent if isinstance(m, Finished)}
    assert ends == dict.fromkeys("abc", "length")
    assert sum(isinstance(m, TokenEvent) for m in post.sent) == 9
    assert max(m.num_running for m in post.sent if isinstance(m, Load)) <= 2


def test_an_engine_with_graphs_keeps_a_page_and_says_the_same(spec_of, monkeypatch):
    """What captures is a stand-in, which does the captured work again on the CPU."""
    replays = []

    def capture(work):
        return lambda: replays.append(work()) or None

    def said(spec):
        post = ListPost()
        loop, started = build_engine(spec, post)
        post.inbox = [
            Submit(
                request_id=str(n),
                prompt_token_ids=tuple(range(1, 4 + n)),
                sampling=Sampling(max_tokens=4, temperature=n / 2, seed=n),
            )
            for n in range(3)
        ]
        for _ in range(8):
            loop.turn()
        loop.close()
        tokens = [m for m in post.sent if isinstance(m, TokenEvent)]
        return started.num_pages, sorted((m.request_id, m.token_ids) for m in tokens)

    spec = spec_of(pool_bytes=1 << 18, block_size=8, max_num_seqs=3)
    num_pages, eager = said(spec)
    assert not replays
    monkeypatch.setattr("server.engine.process.capture_for", lambda spec: capture)
    assert said(spec) == (num_pages - 1, eager)
    assert len(replays) == 3


@pytest.mark.parametrize(
    ("device", "cuda_graphs", "is_captured"),
    [("cpu", True, False), ("cuda", False, False), ("cuda", True, True)],
)
def test_decode_steps_are_captured_on_a_gpu_unless_that_is_switched_off(
    spec_of, monkeypatch, device, cuda_graphs, is_captured
):
    monkeypatch.setattr("server.engine.process.CudaCapture", lambda device: device)
    spec = dataclasses.replace(spec_of(cuda_graphs=cuda_graphs), device=device)
    assert (capture_for(spec) is not None) == is_captured


def test_a_pool_smaller_than_the_models_context_shortens_the_context(spec_of):
    spec = spec_of(block_size=8)
    loop, started = build_engine(spec_of(block_size=8, pool_bytes=3 * spec.page_bytes), ListPost())
    loop.close()
    assert started.max_context == 24


def test_a_pool_that_cannot_serve_is_refused(spec_of):
    with pytest.raises(ModelError, match="pool_bytes"):
        build_engine(spec_of(pool_bytes=100), ListPost())


@pytest.mark.parametrize("num_steps", [1, 4, 30])
def test_progress_is_shown_at_the_ends_and_at_quarters(capsys, num_steps):
    for done in range(num_steps + 1):
        _show_progress("weights", done, num_steps)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "engine: weights 0 %"
    assert lines[-1] == "engine: weights 100 %"
    assert 2 <= len(lines) <= 5
