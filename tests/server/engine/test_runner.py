"""One running batch of base and adapters says, token for token, what transformers says alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import kernels.reference
from adapters_store.image import build_image, plan_image, write_image
from adapters_store.layout import TARGET_PATHS
from adapters_store.reading import AdapterModule
from server.engine.graphs import DecodeGraphs, GraphLimits
from server.engine.request import AdapterImage, Finished, Sampling, Submit, TokenEvent
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.memory.adapter_pool import AdapterPool
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PageGeometry, PagePool
from server.model.decoder import Decoder
from server.model.source import ModelSource
from server.model.weights import load_model

BLOCK_SIZE = 4
MAX_STEPS = 300
ADAPTERS = {
    "all": (3, tuple(TARGET_PATHS)),
    "wide": (17, ("q_proj", "down_proj")),
    "values": (6, ("v_proj",)),
}
"""Name → rank and targets."""


def modules_of(name: str, layout) -> list[AdapterModule]:
    """Random modules, large enough to change what is said."""
    rank, targets = ADAPTERS[name]
    random = np.random.default_rng(len(name))
    return [
        AdapterModule(
            layer=layer,
            target=shape.name,
            rank=rank,
            alpha=rank,
            scaling=1.0,
            a=random.standard_normal((rank, shape.in_features), dtype=np.float32) * 0.3,
            a_dtype="F32",
            b=random.standard_normal((shape.out_features, rank), dtype=np.float32) * 0.3,
            b_dtype="F32",
        )
        for layer in range(layout.num_layers)
        for shape in layout.targets
        if shape.name in targets
    ]


@dataclass
class Engine:
    """Scheduler, memory and model in this process, stepped by hand."""

    directory: Path
    num_pages: int = 200
    replays_decodes: bool = False
    loaded: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        source = ModelSource("tiny-llama", self.directory)
        self.config, weights = load_model(source, torch.float32)
        config, device = self.config, torch.device("cpu")
        decoder = Decoder(config, weights, kernels.reference, device, torch.float32)
        shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        elements = PageGeometry(*shape, BLOCK_SIZE).page_elements
        self.layout = config.layout(elements, "float32")
        self.pool = PagePool(self.num_pages, elements, torch.float32, device)
        self.pool.storage.fill_(torch.nan)
        kv_cache = KVCache(self.pool, BLOCK_SIZE)
        self.adapters = AdapterPool(self.pool, 3, 4096, self.layout, on_loaded=self.loaded.set)
        self.scheduler = Scheduler(
            kv_cache, self.adapters, max_num_seqs=6, max_batched_tokens=11, max_context=60
        )
        graphs = None
        self.num_replays = 0
        if self.replays_decodes:
            page, limits = self.pool.set_aside(), GraphLimits(6, 60, max_span_rows=60)
            graphs = DecodeGraphs(
                decoder,
                kv_cache,
                self.adapters,
                self.pool.storage,
                page,
                limits,
                self.capture,
                lambda *_: None,
            )
        self.runner = Runner(decoder, self.pool, kv_cache, self.adapters, graphs)
        self.kinds: set[tuple[bool, ...]] = set()

    def capture(self, work):
        """A CUDA graph's stand-in: does the same work on the same tensors again."""

        def replay() -> None:
            self.num_replays += 1
            work()

        return replay

    def image(self, name: str, path: Path) -> AdapterImage:
        modules = modules_of(name, self.layout)
        packed = build_image(self.layout, modules, plan_image(self.layout, modules))
        write_image(path / name, packed, self.layout, name)
        return AdapterImage(digest=name, path=str(path / name))

    def run(self, requests: list[Submit]) -> dict[str, list[TokenEvent]]:
        """Everything that is said to `requests`, the first half submitted a step earlier."""
        events: dict[str, list[TokenEvent]] = {r.request_id: [] for r in requests}
        half = -(-len(requests) // 2)
        for request in requests[:half]:
            self.scheduler.submit(request)
        for n in range(MAX_STEPS):
            for request in requests[half:] if n == 1 else []:
                self.scheduler.submit(request)
            if not self.scheduler.has_work:
                return events
            self._step(events)
        raise AssertionError(f"still busy after {MAX_STEPS} steps")

    def _step(self, events: dict[str, list[TokenEvent]]) -> None:
        self.loaded.clear()
        plan = self.scheduler.plan()
        if plan is None:
            assert self.loaded.wait(20), "no load ends"
            return
        prefills = {i.num_tokens > 1 for i in plan.items}
        slots = {i.slot >= 0 for i in plan.items}
        self.kinds.add((len(prefills) == 2, len(slots) == 2))
        for event in self.scheduler.commit(plan, self.runner.run(plan)):
            assert not isinstance(event, Finished) or event.reason == "length", event
            if isinstance(event, TokenEvent):
                events[event.request_id].append(event)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more by waiting for a second thread than it gives them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def engine(tiny_llama):
    engine = Engine(tiny_llama)
    yield engine
    engine.adapters.close()


@pytest.fixture(scope="module")
def truth(tiny_llama):
    """truth(name): transformers' model with the adapter's ΔW added to its weights; None = base."""
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()

    def merged(name: str | None, layout):
        model = copy.deepcopy(base)
        for module in modules_of(name, layout) if name else []:
            path = f"model.layers.{module.layer}.{TARGET_PATHS[module.target]}"
            delta = torch.from_numpy(module.b @ module.a) * module.scaling
            model.get_submodule(path).weight.data += delta
        return model

    return merged


def submit(request_id: str, num_prompt: int, adapter=None, **sampling) -> Submit:
    generator = torch.Generator().manual_seed(num_prompt)
    prompt = torch.randint(0, 256, (num_prompt,), generator=generator).tolist()
    sampling = {"max_tokens": 7, "temperature": 0.0, "num_logprobs": 2, **sampling}
    return Submit(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=Sampling(**sampling),
        adapter=adapter,
    )


def mixed_requests(engine: Engine, path: Path, **sampling) -> list[Submit]:
    images = [engine.image(name, path) for name in ADAPTERS]
    return [
        submit("base-long", 23, **sampling),
        submit("all-1", 9, images[0], **sampling),
        submit("wide-1", 14, images[1], **sampling),
        submit("base-short", 2, **sampling),
        submit("values-1", 17, images[2], **sampling),
        submit("all-2", 1, images[0], **sampling),
        submit("wide-2", 5, images[1], **sampling),
        submit("base-3", 8, **sampling),
    ]


@torch.inference_mode()
def assert_true(request: Submit, events: list[TokenEvent], model) -> None:
    """Greedy tokens equal, log-probabilities within 1e-4, each token from the right adapter."""
    prompt = list(request.prompt_token_ids)
    said = [token for event in events for token in event.token_ids]
    logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    assert said == logits.argmax(dim=-1).tolist()
    for event, exact in zip(events, logits.log_softmax(dim=-1), strict=True):
        (logprobs,) = event.logprobs
        assert logprobs.chosen == pytest.approx(float(exact.max()), abs=1e-4)
        assert logprobs.top_logprobs == pytest.approx(exact.topk(2).values.tolist(), abs=1e-4)
        assert event.adapter_digest == (request.adapter.digest if request.adapter else None)
    assert len(said) == request.sampling.max_tokens


def test_a_mixed_batch_says_what_each_request_alone_is_told_by_transformers(
    engine, truth, tmp_path
):
    requests = mixed_requests(engine, tmp_path)
    events = engine.run(requests)
    assert (True, True) in engine.kinds, "no step had prefill, decode, base and adapters at once"
    answers = set()
    for request in requests:
        name = request.adapter.digest if request.adapter else None
        assert_true(request, events[request.request_id], truth(name, engine.layout))
        answers.add(tuple(event.token_ids for event in events[request.request_id]))
    assert len(answers) == len(requests), "the adapters of this test change nothing"


def test_a_batch_whose_decodes_are_replayed_says_the_same(tiny_llama, truth, tmp_path):
    engine = Engine(tiny_llama, num_pages=60, replays_decodes=True)
    requests = mixed_requests(engine, tmp_path)
    events = engine.run(requests)
    for request in requests:
        name = request.adapter.digest if request.adapter else None
        assert_true(request, events[request.request_id], truth(name, engine.layout))
    engine.adapters.close()
    assert engine.num_replays > 0, "nothing was replayed"


def test_preempted_sequences_say_the_same(tiny_llama, truth, tmp_path):
    engine = Engine(tiny_llama, num_pages=30)
    requests = [submit(f"r{n}", 9 + 2 * n, max_tokens=16) for n in range(8)]
    events = engine.run(requests)
    assert engine.scheduler.num_preemptions > 0, "the pool of this test is too large"
    for request in requests:
        assert_true(request, events[request.request_id], truth(None, engine.layout))
    engine.adapters.close()


def test_seeded_requests_draw_the_same_tokens_in_a_batch_as_alone(engine, tmp_path):
    requests = mixed_requests(engine, tmp_path, temperature=1.0, top_p=0.9, seed=5)
    together = engine.run(requests)
    for request in requests:
        alone = engine.run([request])[request.request_id]
        assert [e.token_ids for e in alone] == [e.token_ids for e in together[request.request_id]]
