"""Bytes and operations of every kernel, against counts made by hand and one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.layout import row_elements
from server.roofline.costs import (
    Query,
    Step,
    adapter_kernels,
    adapter_ranks,
    base_kernels,
    decode_step,
    prefill_step,
)
from server.roofline.shapes import SHAPES, ModelShape

TINY = ModelShape("tiny", 2, 32, 48, 4, 2, 8, 64, 128)


def by_name(kernels):
    return {
        kernel.name: (
            kernel.launches,
            kernel.streamed_bytes,
            kernel.activation_bytes,
            kernel.rewritten_bytes,
            kernel.flops,
        )
        for kernel in kernels
    }


def test_a_decode_step_costs_what_is_counted_by_hand(tiny):
    """3 sequences, 10 tokens each: launches, streamed, activations, rewritten, operations."""
    assert by_name(base_kernels(tiny, decode_step(3, 10, ()))) == {
        "embedding": (1, 3 * 32 * 2, 3 * 32 * 2, 0, 0),
        # 4 norms of 3 rows and the last of 3: x and residual in, residual and output out.
        "rms_norm": (5, 5 * 32 * 2, (15 * 3 - 3) * 64, (15 - 3) * 64, 0),
        "qkv": (2, 2 * 64 * 32 * 2, 2 * 3 * (32 + 64) * 2, 0, 2 * 2 * 3 * 32 * 64),
        "rope_store_kv": (2, 2 * 3 * 32 * 2, 2 * 3 * (64 * 2 + 8 * 4), 2 * 3 * 48 * 2, 0),
        # Each query reads k and v of 9 earlier tokens and sees 10.
        "attention": (2, 2 * 3 * 9 * 32 * 2, 2 * 3 * 96 * 2, 0, 2 * 3 * 10 * 4 * 32),
        "o": (2, 2 * 32 * 32 * 2, 2 * 3 * 64 * 2, 0, 2 * 2 * 3 * 32 * 32),
        "gate_up": (2, 2 * 96 * 32 * 2, 2 * 3 * 128 * 2, 0, 2 * 2 * 3 * 32 * 96),
        "silu_mul": (2, 0, 2 * 3 * 144 * 2, 0, 0),
        "down": (2, 2 * 32 * 48 * 2, 2 * 3 * 80 * 2, 0, 2 * 2 * 3 * 48 * 32),
        "head": (1, 64 * 32 * 2, 3 * 32 * 2 + 3 * 64 * 4, 0, 2 * 3 * 32 * 64),
        "sample": (1, 0, 3 * 64 * 4, 0, 0),
    }


def test_adapters_cost_what_is_counted_by_hand(tiny):
    """3 sequences on 2 adapters of ranks 4 and 6: total rank 10, rank over tokens 4 + 6 + 4."""
    kernels = adapter_kernels(tiny, decode_step(3, 10, (4, 6)))
    assert by_name(kernels) == {
        "shrink qkv": (2, 2 * 10 * 96 * 2, 2 * (3 * 32 * 2 + 42 * 4), 0, 4 * 42 * 32),
        "expand qkv": (2, 2 * 10 * 64 * 2, 2 * (42 * 4 + 3 * 64 * 2), 2 * 3 * 64 * 2, 4 * 14 * 64),
        "shrink o": (2, 2 * 10 * 32 * 2, 2 * (3 * 32 * 2 + 14 * 4), 0, 4 * 14 * 32),
        "expand o": (2, 2 * 10 * 32 * 2, 2 * (14 * 4 + 3 * 32 * 2), 2 * 3 * 32 * 2, 4 * 14 * 32),
        "shrink gate_up": (2, 2 * 10 * 64 * 2, 2 * (3 * 32 * 2 + 28 * 4), 0, 4 * 28 * 32),
        "expand gate_up": (
            2, 2 * 10 * 96 * 2, 2 * (28 * 4 + 3 * 96 * 2), 2 * 3 * 96 * 2, 4 * 14 * 96,
        ),
        "shrink down": (2, 2 * 10 * 48 * 2, 2 * (3 * 48 * 2 + 14 * 4), 0, 4 * 14 * 48),
        "expand down": (2, 2 * 10 * 32 * 2, 2 * (14 * 4 + 3 * 32 * 2), 2 * 3 * 32 * 2, 4 * 14 * 32),
    }  # fmt: skip


@pytest.mark.parametrize("bias", ["attention_bias", "o_bias", "mlp_bias"])
def test_biases_are_streamed_with_their_weights(tiny, bias):
    def weights(shape):
        kernels = base_kernels(shape, decode_step(1, 1, ()))
        linear = {"qkv", "o", "gate_up", "down", "head", "rms_norm"}
        return sum(kernel.streamed_bytes for kernel in kernels if kernel.name in linear)

    biased = replace(tiny, **{bias: True})
    embedding = tiny.vocab_size * tiny.hidden_size
    assert weights(biased) > weights(tiny)
    assert weights(biased) == 2 * (biased.num_parameters - embedding)


def test_a_tied_head_is_read_as_an_untied_one_is(tiny):
    step = decode_step(2, 5, ())
    assert base_kernels(replace(tiny, tie_word_embeddings=True), step) == base_kernels(tiny, step)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [(1,), (16,), (8, 16, 64)])
def test_rank_rows_of_all_projections_are_streamed_once_for_each_distinct_adapter(name, ranks):
    shape = SHAPES[name]
    a_rank = sum(row_elements(t.in_features, t.out_features) for t in shape.targets)
    kernels = adapter_kernels(shape, decode_step(100, 64, ranks))
    streamed = sum(kernel.streamed_bytes for kernel in kernels)
    assert streamed == 2 * shape.num_layers * a_rank * sum(ranks)


def test_adapters_take_eight_launches_a_layer_and_none_without_adapters(tiny):
    kernels = list(adapter_kernels(tiny, decode_step(4, 4, (8,))))
    assert sum(kernel.launches for kernel in kernels) == 8 * tiny.num_layers
    assert not list(adapter_kernels(tiny, decode_step(4, 4, ())))


@given(
    st.lists(
        st.integers(1, 40).flatmap(
            lambda context: st.tuples(st.integers(1, context), st.just(context))
        ),
        min_size=1,
        max_size=4,
    ),
    st.tuples(st.sampled_from((0, 1, 3, 50)), st.sampled_from((0, 1, 3, 50))),
)
def test_attention_counts_the_keys_that_each_query_token_sees(sequences, windows):
    shape = replace(TINY, layer_windows=windows)
    step = Step(tuple(Query(n, context, wants_logits=True) for n, context in sequences), ())
    num_pairs = num_read = 0
    for (num_tokens, context), window in product(sequences, windows):
        first = context - num_tokens
        seen = [
            {key for key in range(query + 1) if not window or query - key < window}
            for query in range(first, context)
        ]
        num_pairs += sum(len(keys) for keys in seen)
        num_read += sum(key < first for key in set().union(*seen))
    attention = {kernel.name: kernel for kernel in base_kernels(shape, step)}["attention"]
    assert attention.flops == 4 * num_pairs * shape.q_size
    assert attention.streamed_bytes == 2 * num_read * 2 * shape.kv_size


@given(st.integers(1, 20), st.integers(1, 100))
def test_a_decode_step_passes_every_key_and_value_of_its_context_once(num_seqs, context):
    kernels = {
        kernel.name: kernel for kernel in base_kernels(TINY, decode_step(num_seqs, context, ()))
    }
    moved = kernels["attention"].streamed_bytes + kernels["rope_store_kv"].streamed_bytes
    assert moved == num_seqs * context * TINY.kv_bytes_per_token


def test_a_prefill_step_takes_whole_prompts_and_the_start_of_one_more():
    step = prefill_step(25, 10, (8, 16))
    assert step.queries == (Query(10, 10, True), Query(10, 10, True), Query(5, 5, False))
    assert (step.num_tokens, step.num_logit_rows) == (25, 2)
    assert step.rank_tokens == 10 * 8 + 10 * 16 + 5 * 8
    assert prefill_step(10, 10, ()).queries == (Query(10, 10, True),)


def test_a_prefill_step_that_ends_no_prompt_computes_no_logits(tiny):
    kernels = {kernel.name: kernel for kernel in base_kernels(tiny, prefill_step(5, 10, ()))}
    assert kernels.keys().isdisjoint({"head", "sample"})
    assert kernels["rms_norm"].launches == 2 * tiny.num_layers


def test_adapters_without_a_sequence_cost_nothing(tiny):
    few = list(adapter_kernels(tiny, prefill_step(5, 10, (8, 16, 64))))
    assert few == list(adapter_kernels(tiny, prefill_step(5, 10, (8,))))


def test_ranks_are_given_to_adapters_in_turn():
    assert adapter_ranks((8, 16, 64), 5) == (8, 16, 64, 8, 16)
    assert adapter_ranks((8,), 0) == ()
