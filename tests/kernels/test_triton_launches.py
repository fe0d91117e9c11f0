"""How many kernels a step of the real decoder launches, counted where they are launched."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch

from adapters_store.layout import TARGET_PATHS
from kernels import reference
from kernels.layout import AdapterIndex, AttentionIndex, RankRows, row_elements
from server.model.config import ModelConfig
from server.model.decoder import Decoder, StepInput
from server.model.rope import RopeFrequencies
from server.model.weights import LayerWeights, Weights

MODULES = (
    "activation", "attention_decode", "attention_prefill", "bgmv", "norm", "rope", "sgmv",
)  # fmt: skip
CONFIG = ModelConfig(
    name="tiny",
    family="llama",
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=40,
    rms_norm_eps=1e-5,
    max_context=64,
    tie_word_embeddings=True,
    attention_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope=RopeFrequencies(tuple(10.0**-i for i in range(8))),
    layer_rotates=(True, True),
    layer_windows=(0, 0),
    eos_token_ids=(2,),
)
BLOCK_SIZE = 16
NUM_SLOTS, RANK = 3, 4
# Steps as (slot, query tokens) of each sequence.
STEPS = {
    "decode": ((-1, 1), (0, 1), (1, 1), (2, 1)),
    "prefill": ((0, 18), (2, 20)),
    "mixed": ((-1, 5), (-1, 1), (0, 1), (1, 17), (2, 1)),
    "base": ((-1, 18), (-1, 1)),
}
BESIDE_ADAPTERS = {"_rms_norm_kernel": 2, "_rope_store_kv_kernel": 1, "_silu_mul_kernel": 1}
DECODE_ATTENTION = {"_decode_attention_kernel": 1, "_combine_splits_kernel": 1}
PREFILL_ATTENTION = {"_prefill_attention_kernel": 1}
BGMV = {"_bgmv_shrink_kernel": 4, "_bgmv_expand_kernel": 4}
SGMV = {"_sgmv_shrink_kernel": 4, "_sgmv_expand_kernel": 4}
PER_LAYER = {
    "decode": BESIDE_ADAPTERS | DECODE_ATTENTION | BGMV,
    "prefill": BESIDE_ADAPTERS | PREFILL_ATTENTION | SGMV,
    "mixed": BESIDE_ADAPTERS | DECODE_ATTENTION | PREFILL_ATTENTION | SGMV,
    "base": BESIDE_ADAPTERS | DECODE_ATTENTION | PREFILL_ATTENTION,
}


def random(*shape, generator):
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def build_decoder(kernels):
    generator = torch.Generator().manual_seed(0)
    hidden, mlp, q, kv = 32, 48, CONFIG.q_size, CONFIG.kv_size
    layers = [
        LayerWeights(
            input_norm=torch.ones(hidden),
            qkv=random(q + 2 * kv, hidden, generator=generator),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            o=random(hidden, q, generator=generator),
            o_bias=None,
            post_norm=torch.ones(hidden),
            gate_up=random(2 * mlp, hidden, generator=generator),
            gate_up_bias=None,
            down=random(hidden, mlp, generator=generator),
            down_bias=None,
        )
        for _ in range(CONFIG.num_layers)
    ]
    embedding = random(CONFIG.vocab_size, hidden, generator=generator)
    weights = Weights(embedding, layers, norm=torch.ones(hidden), head=embedding)
    return Decoder(CONFIG, weights, kernels, torch.device("cpu"), torch.float32)


def adapters_in_pages():
    """Pages of KV, then pages of rank rows: every slot has rank RANK in every target."""
    generator = torch.Generator().manual_seed(1)
    page_elements = BLOCK_SIZE * CONFIG.kv_elements_per_token
    storage = random(64, page_elements, generator=generator)
    num_entries = CONFIG.num_layers * len(TARGET_PATHS)
    offsets, place = torch.zeros(NUM_SLOTS, num_entries * RANK, dtype=torch.int64), 16
    for slot in range(NUM_SLOTS):
        place, used = place + 1, 0
        for entry in range(num_entries):
            shape = CONFIG.target_shapes()[entry % len(TARGET_PATHS)]
            size = row_elements(shape.in_features, shape.out_features)
            for i in range(RANK):
                if used + size > page_elements:
                    place, used = place + 1, 0
                offsets[slot, entry * RANK + i] = place * page_elements + used
                used += size
    row_ptr = (torch.arange(num_entries + 1, dtype=torch.int32) * RANK).repeat(NUM_SLOTS, 1)
    return storage, RankRows(row_ptr, offsets, torch.full(offsets.shape, 0.5))


def build_step(sequences):
    """A step in which every sequence has one block and its query tokens end its context."""
    storage, rows = adapters_in_pages()
    lengths = torch.tensor([length for _, length in sequences])
    slots = torch.tensor([slot for slot, _ in sequences], dtype=torch.int32)
    blocks = torch.arange(2 * len(sequences), dtype=torch.int32).view(-1, 2)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    pages = blocks.repeat_interleave(lengths, dim=0)
    page = pages.gather(1, positions[:, None] // BLOCK_SIZE)[:, 0].long()
    query_start = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32)
    used, counts = slots.unique_consecutive(return_inverse=True)
    by_slot = torch.zeros(len(used), dtype=torch.int64).index_add(0, counts, lengths)
    num_base = int(by_slot[used < 0].sum())
    segments = by_slot[used >= 0]
    return StepInput(
        token_ids=torch.arange(len(positions)) % CONFIG.vocab_size,
        positions=positions.to(torch.int32),
        kv_slot=page * BLOCK_SIZE + positions % BLOCK_SIZE,
        logit_rows=query_start[1:].long() - 1,
        attention=AttentionIndex(
            query_start=query_start,
            context_len=lengths.to(torch.int32),
            block_table=blocks,
            decode=torch.nonzero(lengths == 1).flatten().to(torch.int32),
            prefill=torch.nonzero(lengths != 1).flatten().to(torch.int32),
            max_query=int(lengths.max()),
            max_context=int(lengths.max()),
        ),
        adapters=AdapterIndex(
            token_slot=slots.repeat_interleave(lengths),
            segment_start=(num_base + torch.tensor([0, *segments.cumsum(0)])).to(torch.int32),
            segment_slot=used[used >= 0],
            num_base=num_base,
            max_segment=max(segments.tolist(), default=0),
            max_span_rows=3 * RANK if len(segments) else 0,
        ),
        rows=rows,
        storage=storage,
    )


@pytest.fixture
def launches(triton_ops, monkeypatch):
    """The name of every kernel that is launched, in order."""
    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            recorded.append(self.kernel.__name__)
            return self.kernel[grid]

    for name in MODULES:
        module = importlib.import_module(f"kernels.triton.{name}")
        for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(getattr(module, kernel)))
    return recorded


@pytest.mark.parametrize("kind", STEPS)
def test_a_layer_launches_these_kernels_and_no_more(triton_ops, launches, kind):
    step = build_step(STEPS[kind])
    build_decoder(triton_ops).forward(step)
    counts = Counter(launches)
    of_adapters = sum(n for name, n in counts.items() if "gmv" in name)
    assert of_adapters <= 8 * CONFIG.num_layers
    counts["_rms_norm_kernel"] -= 1  # the norm before the head; the first layer's is its own
    expected = {name: n * CONFIG.num_layers for name, n in PER_LAYER[kind].items()}
    assert counts == expected


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_the_decoders_logits_are_those_of_the_reference(triton_ops, kind):
    logits = build_decoder(triton_ops).forward(build_step(STEPS[kind]))
    expected = build_decoder(reference).forward(build_step(STEPS[kind]))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
