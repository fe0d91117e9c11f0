"""Replayed decode steps compute what eager ones compute, and touch nobody else's memory.

On the CPU a recorder stands for the capture: its replay does the same work on the same tensors.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import kernels.reference
from kernels.layout import RankRows, aligned, row_elements
from server.engine import batch
from server.engine.graphs import CudaCapture, DecodeGraphs, GraphLimits
from server.engine.plan import PlannedSequence, StepPlan
from server.engine.request import Sampling, Submit
from server.engine.runner import Runner
from server.engine.sequence import Sequence
from server.memory.kv_cache import KVCache
from server.memory.page_pool import PageGeometry, PagePool
from server.model.config import read_model_config
from server.model.decoder import Decoder
from server.model.source import ModelSource
from server.model.weights import expected_shapes, load_model

BLOCK_SIZE = 4
NUM_PAGES = 400
LIMITS = GraphLimits(max_num_seqs=9, max_context=30, max_span_rows=40)
BATCH_SIZES, CONTEXTS = [1, 2, 4, 8, 9], [8, 30]
RANKS = [3, 8, 1]  # of each slot
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

ASKS_NOTHING = SimpleNamespace(
    rms_norm=lambda x, weight, eps: x.clone(),
    add_rms_norm=lambda x, residual, weight, eps: residual.add_(x),
    silu_mul=lambda gate_up: gate_up.chunk(2, dim=-1)[0].contiguous(),
    rope_store_kv=lambda *arguments: None,
    paged_attention=lambda qkv, *arguments: qkv[:, :64].contiguous(),
    add_adapters=lambda *arguments: None,
)
"""Kernels without arithmetic that, like those of a GPU, look at no value on the host."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random Llama with heads that the GPU kernels take."""
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(3)
    shapes = expected_shapes(read_model_config(directory, "tiny"))
    weights = {
        name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Recorder:
    """A Capture: remembers what it was given, and counts replays by the order of capture."""

    def __init__(self) -> None:
        self.works: list = []
        self.replayed: list[int] = []

    def __call__(self, work):
        number = len(self.works)
        self.works.append(work)
        work()

        def replay() -> None:
            self.replayed.append(number)
            work()

        return replay


class Watched:
    """A decoder that shows the steps it was given."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.steps: list = []

    def forward(self, step):
        self.steps.append(step)
        return self.decoder.forward(step)


class World:
    """A model, a pool in which everything unused is NaN, and three adapters in it."""

    def __init__(self, directory, capture, device="cpu", ops=kernels.reference) -> None:
        self.device = torch.device(device)
        config, weights = load_model(ModelSource("tiny", directory), torch.float32)
        self.decoder = Watched(Decoder(config, weights, ops, self.device, torch.float32))
        shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        elements = PageGeometry(*shape, BLOCK_SIZE).page_elements
        self.pool = PagePool(NUM_PAGES, elements, torch.float32, self.device)
        self.pool.storage.fill_(torch.nan)
        self.scratch_page = self.pool.set_aside()
        self.kv_cache = KVCache(self.pool, BLOCK_SIZE)
        self.random = random.Random(5)
        self.generator = torch.Generator().manual_seed(5)
        self.span_rows = dict(enumerate(3 * rank for rank in RANKS))
        self.adapters = SimpleNamespace(
            rows=self._install(config), max_span_rows=lambda slot: self.span_rows[slot]
        )
        self.capture = capture
        self.num_sequences = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.engine.graphs.MIN_CONTEXT", CONTEXTS[0])
            self.graphs = DecodeGraphs(
                self.decoder,
                self.kv_cache,
                self.adapters,
                self.pool.storage,
                self.scratch_page,
                LIMITS,
                capture,
                lambda *_: None,
            )
        self.runner = Runner(self.decoder, self.pool, self.kv_cache, self.adapters, self.graphs)
        self.eager = Runner(self.decoder, self.pool, self.kv_cache, self.adapters)

    def _install(self, config) -> RankRows:
        """Random rank rows; the second slot leaves every second target out."""
        targets = config.target_shapes() * config.num_layers
        row_ptr = torch.zeros(len(RANKS), len(targets) + 1, dtype=torch.int32)
        offsets: list[list[int]] = []
        for slot, rank in enumerate(RANKS):
            offsets.append([])
            for n, target in enumerate(targets):
                is_left_out = slot == 1 and n % 2
                for _ in range(0 if is_left_out else rank):
                    offsets[-1].append(self._write_row(target.in_features, target.out_features))
                row_ptr[slot, n + 1] = len(offsets[-1])
        most = max(map(len, offsets))
        row_offset = torch.tensor([row + [0] * (most - len(row)) for row in offsets])
        parts = (row_ptr, row_offset, torch.full((len(RANKS), most), 0.5))
        return RankRows(*(part.to(self.device) for part in parts))

    def _write_row(self, in_features: int, out_features: int) -> int:
        (page,) = self.pool.allocate(1)
        self._fill([page], row_elements(in_features, out_features))
        assert aligned(in_features) == in_features
        return page * self.pool.page_elements

    def _fill(self, pages: list[int], num_elements: int) -> None:
        values = torch.randn(len(pages), num_elements, generator=self.generator) * 0.3
        self.pool.storage[pages, :num_elements] = values.to(self.device)

    def item(self, num_known: int, slot: int = -1, num_tokens: int = 1, **sampling):
        """The last `num_tokens` of a sequence's tokens; the others are in the KV cache."""
        name = f"s{self.num_sequences}"
        self.num_sequences += 1
        prompt = tuple(self.random.randrange(97) for _ in range(num_known))
        request = Submit(
            request_id=name,
            prompt_token_ids=prompt,
            sampling=Sampling(max_tokens=1, **{"temperature": 0.0, **sampling}),
        )
        self.kv_cache.extend(name, num_known)
        self._fill(list(self.kv_cache.table(name)), self.pool.page_elements)
        start = num_known - num_tokens
        return PlannedSequence(Sequence(request, 0), start, num_tokens, slot, samples=True)

    def random_plan(self, num_items: int, max_context: int, slots: list[int]) -> StepPlan:
        items = [
            self.item(self.random.randint(1, max_context), self.random.choice(slots))
            for _ in range(num_items)
        ]
        items.sort(key=lambda item: item.slot)
        return StepPlan(tuple(items))

    def free_all(self) -> None:
        """Forget every sequence."""
        for n in range(self.num_sequences):
            self.kv_cache.free(f"s{n}")

    def eager_logits(self, plan: StepPlan) -> torch.Tensor:
        step = batch.build(plan, self.kv_cache, self.adapters, self.pool.storage)
        return self.decoder.forward(step)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more by waiting for a second thread than it gives them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def lasting_world(directory, one_thread):
    return World(directory, Recorder())


@pytest.fixture
def world(lasting_world):
    """One for all tests: capturing takes long where kernels are the reference."""
    lasting_world.capture.replayed.clear()
    yield lasting_world
    lasting_world.free_all()


def captured(world: World, num_rows: int, max_context: int) -> tuple[int, int]:
    """In which places the two graphs of a size were captured: the base model's, the adapters'."""
    steps = world.decoder.steps[1 : 1 + len(world.capture.works)]
    base, adapters = (
        n
        for n, step in enumerate(steps)
        if (len(step.token_ids), step.attention.max_context) == (num_rows, max_context)
    )
    return base, adapters


def assert_same(world: World, plan: StepPlan) -> None:
    """A replay gives the logits of the eager step, and leaves in every page what that leaves."""
    before = world.pool.storage.clone()
    logits = world.graphs.run(plan).clone()
    after = world.pool.storage.clone()
    world.pool.storage.copy_(before)
    torch.testing.assert_close(logits, world.eager_logits(plan), rtol=1e-4, atol=1e-4)
    after[world.scratch_page] = before[world.scratch_page]
    torch.testing.assert_close(after, world.pool.storage, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("max_context", CONTEXTS)
@pytest.mark.parametrize("slots", [[-1], [-1, 0, 1, 2], [2]], ids=str)
def test_a_replay_of_every_size_equals_the_eager_step(world, max_context, slots):
    for num_rows in BATCH_SIZES:
        for num_items in {num_rows, num_rows // 2 + 1}:
            plan = world.random_plan(num_items, max_context, slots)
            assert_same(world, plan)


def test_each_size_has_a_graph_without_adapters_and_one_with(world):
    assert len(world.capture.works) == 2 * len(BATCH_SIZES) * len(CONTEXTS)
    steps = world.decoder.steps[1:]
    for num_rows in BATCH_SIZES:
        for max_context in CONTEXTS:
            base, adapters = captured(world, num_rows, max_context)
            assert steps[base].adapters.max_segment == 0
            assert steps[adapters].adapters.max_segment == 1
            assert steps[adapters].adapters.num_base == 0
            assert steps[adapters].adapters.max_span_rows == LIMITS.max_span_rows


@pytest.mark.parametrize(
    ("num_items", "num_known", "size"),
    [
        (1, 8, (1, 8)),
        (3, 9, (4, 30)),
        (5, 1, (8, 8)),
        (8, 30, (8, 30)),
        (9, 9, (9, 30)),
    ],
)
@pytest.mark.parametrize("last_slot", [-1, 1])
def test_the_smallest_graph_that_holds_a_step_is_replayed_alone(
    world, num_items, num_known, size, last_slot
):
    items = [world.item(1) for _ in range(num_items - 1)]
    world.graphs.run(StepPlan((*items, world.item(num_known, last_slot))))
    base, adapters = captured(world, *size)
    assert world.capture.replayed == [base if last_slot < 0 else adapters]


def test_base_traffic_launches_nothing_for_adapters(directory, monkeypatch):
    calls = []
    ops = SimpleNamespace(**vars(kernels.reference))
    ops.add_adapters = lambda *arguments: calls.append(arguments)
    world = World(directory, Recorder(), ops=ops)
    calls.clear()
    world.graphs.run(world.random_plan(5, 20, [-1]))
    assert not calls
    world.graphs.run(world.random_plan(5, 20, [0]))
    assert len(calls) == 4 * CONFIG["num_hidden_layers"]


def test_an_empty_batch_lies_on_the_scratch_page(directory):
    world = World(directory, Recorder(), ops=ASKS_NOTHING)
    for step in world.decoder.steps:
        assert (step.attention.block_table == world.scratch_page).all()
        assert (step.kv_slot // BLOCK_SIZE == world.scratch_page).all()
        assert (step.attention.context_len == 1).all()
        assert (step.adapters.token_slot == -1).all()


def test_replays_read_the_tensors_that_were_captured_and_no_new_ones(world):
    def places(steps):
        return {
            tensor.data_ptr()
            for step in steps
            for part in (step, step.attention, step.adapters)
            for tensor in part
            if isinstance(tensor, torch.Tensor)
        }

    at_capture, num_steps = places(world.decoder.steps[1:]), len(world.decoder.steps)
    logits = set()
    for num_items in (1, 3, 5, 9, 5):
        plan = world.random_plan(num_items, 30, [-1, 0])
        logits.add(world.graphs.run(plan).data_ptr())
    assert places(world.decoder.steps[num_steps:]) <= at_capture
    assert len(logits) == 1


def test_rows_of_an_earlier_step_are_padding_again(world):
    """What a longer batch left behind is neither read nor written by a shorter one."""
    world.graphs.run(world.random_plan(8, 30, [0, 1]))
    assert_same(world, world.random_plan(5, 30, [-1, 2]))
    step = world.decoder.steps[-2]  # the last one is the eager one
    assert step.adapters.token_slot[5:].tolist() == [-1, -1, -1]
    assert step.attention.context_len[5:].tolist() == [1, 1, 1]


def test_no_sequence_and_no_adapter_gets_the_scratch_page(world):
    pages = world.pool.allocate(world.pool.num_free)
    world.pool.free(pages)
    assert world.scratch_page not in pages
    assert not world.adapters.rows.row_offset.eq(
        world.scratch_page * world.pool.page_elements
    ).any()


def test_steps_that_are_not_all_decodes_are_not_replayed(world):
    decode = world.item(9)
    prefill = world.item(9, num_tokens=4)
    chunk = PlannedSequence(world.item(9).sequence, 3, 1, -1, samples=False)
    for items in ([decode, prefill], [prefill], [decode, chunk]):
        assert world.graphs.run(StepPlan(tuple(items))) is None
    assert world.capture.replayed == []
    assert len(world.runner.run(StepPlan((decode, prefill)))) == 2


def test_an_adapter_with_more_rows_than_were_captured_is_run_eagerly(world, monkeypatch):
    monkeypatch.setitem(world.span_rows, 1, LIMITS.max_span_rows + 1)
    assert world.graphs.run(StepPlan((world.item(9, 0), world.item(9, 1)))) is None
    assert world.graphs.run(StepPlan((world.item(9, 0), world.item(9, 2)))) is not None


SAMPLINGS = [
    {},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
    {"num_logprobs": 2},
]


@pytest.mark.parametrize("name", ["runner", "eager"])
@pytest.mark.parametrize("samplings", [SAMPLINGS[:1], SAMPLINGS], ids=["greedy", "mixed"])
@pytest.mark.parametrize("num_tokens", [1, 3], ids=["decode", "prefill"])
def test_the_host_waits_for_a_step_once(directory, host_syncs, name, samplings, num_tokens):
    world = World(directory, Recorder(), ops=ASKS_NOTHING)
    items = [world.item(9, -1, num_tokens, **sampling) for sampling in samplings]
    plan = StepPlan((*items, world.item(7, 1)))
    with host_syncs:
        getattr(world, name).run(plan)
    assert len(host_syncs.seen) == 1
    is_replayed = name == "runner" and num_tokens == 1
    assert len(world.capture.replayed) == is_replayed


def test_sizes_rise_without_much_padding_to_the_limit():
    for most in [*range(1, 140), 256, 1000]:
        sizes = LIMITS._replace(max_num_seqs=most).batch_sizes()
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for least, size in pairwise(sizes):
            assert size - least <= max(8, least / 8)
            assert size <= 2 * least
    assert len(LIMITS._replace(max_num_seqs=256).batch_sizes()) < 30


@pytest.mark.parametrize(
    ("max_context", "contexts"),
    [
        (100, [100]),
        (2048, [2048]),
        (8192, [2048, 8192]),
        (131072, [2048, 8192, 32768, 131072]),
    ],
)
def test_contexts_grow_to_the_limit(max_context, contexts):
    assert LIMITS._replace(max_context=max_context).contexts() == contexts


@pytest.fixture(scope="module")
def gpu_world(directory, one_thread):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import kernels.triton.ops

    return World(directory, CudaCapture(torch.device("cuda")), "cuda", kernels.triton.ops)


@pytest.mark.gpu
@pytest.mark.parametrize("max_context", CONTEXTS)
@pytest.mark.parametrize("slots", [[-1], [-1, 0, 1, 2], [2]], ids=str)
def test_on_a_gpu_a_replay_of_every_size_equals_the_eager_step(gpu_world, max_context, slots):
    for num_rows in [*BATCH_SIZES, *BATCH_SIZES]:  # in another order than that of the capture
        plan = gpu_world.random_plan(num_rows // 2 + 1, max_context, slots)
        assert_same(gpu_world, plan)
        gpu_world.free_all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["runner", "eager"])
@pytest.mark.parametrize("num_tokens", [1, 3], ids=["decode", "prefill"])
def test_on_a_gpu_the_host_waits_for_a_step_once(gpu_world, name, num_tokens):
    items = [gpu_world.item(9, -1, num_tokens, **sampling) for sampling in SAMPLINGS]
    plan = StepPlan((*items, gpu_world.item(7, 1)))
    run = getattr(gpu_world, name).run
    expected = run(plan)  # compiles what is not compiled yet
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens = run(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ["synchroniz" in str(warning.message) for warning in caught] == [True]
    assert [token.token_id for token in tokens] == [token.token_id for token in expected]
