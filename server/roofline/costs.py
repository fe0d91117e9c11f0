"""What each kernel of a step moves and computes: bytes and operations from shapes alone.

Counts what the operation needs, each weight, cached key and rank row once a step, not what one
implementation does. docs/planning.md has the formulae.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

from kernels.layout import aligned
from server.roofline.shapes import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapters_store.layout import TargetShape
    from server.roofline.shapes import ModelShape

FP32_BYTES = 4
"""Of logits, and of what shrink leaves for expand."""

SPANS = (("qkv", 0, 3), ("o", 3, 4), ("gate_up", 4, 6), ("down", 6, 7))
"""Projections that share their input: name, first target, end."""


class Query(NamedTuple):
    """One sequence in a step."""

    num_tokens: int  # that the step computes
    context: int  # tokens in the KV cache after them
    wants_logits: bool


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of a step; sequence i uses adapter i mod the number of adapters."""

    queries: tuple[Query, ...]
    adapter_ranks: tuple[int, ...]  # of the distinct adapters; empty: base model only

    @property
    def num_tokens(self) -> int:
        return sum(query.num_tokens for query in self.queries)

    @property
    def num_logit_rows(self) -> int:
        return sum(query.wants_logits for query in self.queries)

    @property
    def used_ranks(self) -> tuple[int, ...]:
        """Of the adapters that have a sequence."""
        return self.adapter_ranks[: len(self.queries)]

    @property
    def rank_tokens(self) -> int:
        """The sum over tokens of the rank of their adapter."""
        ranks = cycle(self.adapter_ranks or (0,))
        return sum(
            query.num_tokens * rank for query, rank in zip(self.queries, ranks, strict=False)
        )


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One kernel over a whole step. Operations are those of products, two for each multiply-add."""

    name: str
    launches: int
    streamed_bytes: int  # weights, KV cache, rank rows: in memory between steps
    activation_bytes: int  # inputs and outputs, which a cache may hold between two kernels
    rewritten_bytes: int  # of these, what is read and written in place
    flops: int


def adapter_ranks(ranks: Sequence[int], num_adapters: int) -> tuple[int, ...]:
    """Ranks of `num_adapters` adapters: the given ones in turn, as S-LoRA's workloads have them."""
    return tuple(islice(cycle(ranks), num_adapters))


def decode_step(num_seqs: int, context: int, ranks: tuple[int, ...]) -> Step:
    """One token for each of `num_seqs` sequences, the last of its `context` tokens."""
    return Step((Query(1, context, wants_logits=True),) * num_seqs, ranks)


def prefill_step(num_tokens: int, context: int, ranks: tuple[int, ...]) -> Step:
    """`num_tokens` of new prompts of `context` tokens each; the last one may be a first chunk."""
    num_whole, rest = divmod(num_tokens, context)
    queries = (Query(context, context, wants_logits=True),) * num_whole
    return Step(queries + (Query(rest, rest, wants_logits=False),) * (rest > 0), ranks)


def base_kernels(shape: ModelShape, step: Step) -> tuple[KernelCost, ...]:
    """The base model's kernels, in the order in which a layer has them."""
    tokens, rows, layers = step.num_tokens, step.num_logit_rows, shape.num_layers
    hidden, mlp, q, kv = shape.hidden_size, shape.intermediate_size, shape.q_size, shape.kv_size
    embedded = tokens * hidden * ITEM_BYTES
    logits = rows * shape.vocab_size
    num_norms, norm_rows = 2 * layers + (rows > 0), 2 * layers * tokens + rows
    cos_sin = shape.head_dim * FP32_BYTES
    kernels = (
        KernelCost("embedding", 1, embedded, embedded, 0, 0),
        KernelCost(
            "rms_norm",
            num_norms,
            num_norms * hidden * ITEM_BYTES,
            (3 * norm_rows - tokens) * hidden * ITEM_BYTES,  # the first has no residual
            (norm_rows - tokens) * hidden * ITEM_BYTES,
            0,
        ),
        _linear("qkv", layers, tokens, hidden, q + 2 * kv, shape.attention_bias),
        KernelCost(
            "rope_store_kv",
            layers,
            tokens * shape.kv_bytes_per_token,
            layers * tokens * ((q + 2 * kv) * ITEM_BYTES + cos_sin),
            layers * tokens * (q + kv) * ITEM_BYTES,
            0,
        ),
        _attention(shape, step),
        _linear("o", layers, tokens, q, hidden, shape.o_bias),
        _linear("gate_up", layers, tokens, hidden, 2 * mlp, shape.mlp_bias),
        KernelCost("silu_mul", layers, 0, layers * tokens * 3 * mlp * ITEM_BYTES, 0, 0),
        _linear("down", layers, tokens, mlp, hidden, shape.mlp_bias),
    )
    if not rows:
        return kernels
    head = KernelCost(
        "head",
        1,
        shape.vocab_size * hidden * ITEM_BYTES,
        rows * hidden * ITEM_BYTES + logits * FP32_BYTES,
        0,
        2 * logits * hidden,
    )
    return (*kernels, head, KernelCost("sample", 1, 0, logits * FP32_BYTES, 0, 0))


def adapter_kernels(shape: ModelShape, step: Step) -> Iterator[KernelCost]:
    """A shrink and an expand for each span; none where no sequence has an adapter."""
    total_rank, rank_tokens = sum(step.used_ranks), step.rank_tokens
    if not total_rank:
        return
    layers, tokens = shape.num_layers, step.num_tokens
    for name, first, end in SPANS:
        targets = shape.targets[first:end]
        features, out = targets[0].in_features, sum(target.out_features for target in targets)
        ranked = len(targets) * rank_tokens * FP32_BYTES
        yield KernelCost(
            f"shrink {name}",
            layers,
            layers * total_rank * len(targets) * aligned(features) * ITEM_BYTES,
            layers * (tokens * features * ITEM_BYTES + ranked),
            0,
            2 * layers * len(targets) * rank_tokens * features,
        )
        yield KernelCost(
            f"expand {name}",
            layers,
            layers * total_rank * _aligned_outputs(targets) * ITEM_BYTES,
            layers * (ranked + tokens * out * ITEM_BYTES),
            layers * tokens * out * ITEM_BYTES,  # added to the base output
            2 * layers * rank_tokens * out,
        )


def _aligned_outputs(targets: Sequence[TargetShape]) -> int:
    return sum(aligned(target.out_features) for target in targets)


def _linear(
    name: str, layers: int, tokens: int, in_features: int, out_features: int, has_bias: bool
) -> KernelCost:
    return KernelCost(
        name,
        layers,
        layers * out_features * (in_features + has_bias) * ITEM_BYTES,
        layers * tokens * (in_features + out_features) * ITEM_BYTES,
        0,
        2 * layers * tokens * in_features * out_features,
    )


def _attention(shape: ModelShape, step: Step) -> KernelCost:
    """Keys and values of earlier tokens are streamed; those of the step were just written."""
    layers, tokens = shape.num_layers, step.num_tokens
    num_read = num_pairs = 0
    for window, num_layers in Counter(shape.layer_windows or (0,) * layers).items():
        for query, num_queries in Counter(step.queries).items():
            weight = num_layers * num_queries
            num_read += weight * _cached_keys(query, window)
            num_pairs += weight * _pairs(query, window)
    return KernelCost(
        "attention",
        layers,
        num_read * 2 * shape.kv_size * ITEM_BYTES,
        layers * tokens * (2 * shape.q_size + 2 * shape.kv_size) * ITEM_BYTES,
        0,
        4 * num_pairs * shape.q_size,
    )


def _cached_keys(query: Query, window: int) -> int:
    """Tokens from before the step that any of the query's tokens sees; window 0 = all."""
    return min(query.context - query.num_tokens, (window or query.context) - 1)


def _pairs(query: Query, window: int) -> int:
    """The sum over the query's tokens of the tokens that each sees, itself included."""
    limit, earlier = window or query.context, query.context - query.num_tokens
    ramp = min(query.num_tokens, max(0, limit - earlier))  # tokens that see all before them
    return ramp * (2 * earlier + ramp + 1) // 2 + (query.num_tokens - ramp) * limit
