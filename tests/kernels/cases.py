"""Inputs for the kernel tests: adapters in scattered pages, and sequences in a paged KV cache.

Everything that no operation may read is NaN: pages that nobody owns, the rest of a page, the
padding of a rank row, KV entries past a sequence's context.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.layout import (
    AdapterIndex,
    AttentionIndex,
    RankRows,
    TargetSpan,
    aligned,
    row_elements,
)

Popularity = Literal["distinct", "uniform", "skewed", "identical"]
Traffic = Literal["decode", "prefill", "chunked", "mixed"]

ODD_RANKS = (1, 6, 8, 17, 64)
OTHER_TARGET_ROWS = 2  # rows that every slot has for a target before and one after the span


@dataclass(frozen=True)
class Lora:
    """One module of an adapter as PEFT has it: delta = scaling * b @ a."""

    a: Tensor  # [r, I] fp32, exact in the case's dtype
    b: Tensor  # [O, r] fp32, exact in the case's dtype
    scaling: float


@dataclass(frozen=True)
class AdapterCase:
    """The arguments of `add_adapters`, and the dense weights that they were packed from."""

    out: Tensor
    x: Tensor
    storage: Tensor
    rows: RankRows
    index: AdapterIndex
    span: TargetSpan
    loras: dict[tuple[int, int], Lora]  # by (slot, target of the span); absent = no rows

    def expected(self) -> Tensor:
        """out + x (scaling * b a)^T in fp32, by dense products and without the packed rows."""
        total = self.out.float()
        for t, slot in enumerate(self.index.token_slot.tolist()):
            for j, (start, stop) in enumerate(itertools.pairwise(self.span.out_start)):
                lora = self.loras.get((slot, j))
                if lora is not None:
                    delta = lora.scaling * (lora.b @ lora.a)
                    total[t, start:stop] += delta @ self.x[t].float()
        return total


def make_adapter_case(
    *,
    popularity: Popularity = "skewed",
    num_tokens: int = 24,
    num_base: int = 3,
    num_slots: int = 6,
    ranks: tuple[int, ...] = ODD_RANKS,
    in_features: int = 64,
    out_widths: tuple[int, ...] = (64, 32, 32),
    missing_targets: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterCase:
    """A step of `num_tokens`, the first `num_base` of the base model, over mixed-rank adapters.

    Slot s has rank ranks[(s + j) % len(ranks)] at target j of the span; with missing_targets
    every third (slot, target) has no rows. "distinct" gives every token a slot of its own,
    whatever num_slots says. strided: rows of x and out lie farther apart than they are wide.
    """
    generator = torch.Generator().manual_seed(seed)
    num_adapter_tokens = num_tokens - num_base
    if popularity == "distinct":
        num_slots = max(num_adapter_tokens, 1)
    token_slot = torch.full((num_tokens,), -1, dtype=torch.int32)
    token_slot[num_base:] = _draw_slots(popularity, num_adapter_tokens, num_slots, generator)
    loras = {
        (slot, j): _random_lora(ranks[(slot + j) % len(ranks)], in_features, width, slot, generator)
        for slot in range(num_slots)
        for j, width in enumerate(out_widths)
        if not (missing_targets and (slot + j) % 3 == 2)
    }
    loras = {
        key: Lora(lora.a.to(dtype).float(), lora.b.to(dtype).float(), lora.scaling)
        for key, lora in loras.items()
    }
    storage, rows = _pack(loras, num_slots, in_features, out_widths, dtype, generator)
    out_start = tuple(itertools.accumulate(out_widths, initial=0))
    num_targets = len(out_widths) + 2
    span = TargetSpan(first=num_targets + 1, out_start=out_start)
    return AdapterCase(
        out=_matrix(num_tokens, out_start[-1], strided, dtype, generator),
        x=_matrix(num_tokens, in_features, strided, dtype, generator),
        storage=storage,
        rows=rows,
        index=make_adapter_index(token_slot, _max_span_rows(token_slot, rows, span)),
        span=span,
        loras=loras,
    )


def make_adapter_index(token_slot: Tensor, max_span_rows: int) -> AdapterIndex:
    """The index of tokens [T] int32 that are ordered by slot, base tokens first."""
    num_base = int((token_slot < 0).sum())
    slots, lengths = token_slot[num_base:].unique_consecutive(return_counts=True)
    segment_start = torch.tensor([num_base, *lengths.tolist()], dtype=torch.int32).cumsum(0)
    return AdapterIndex(
        token_slot=token_slot,
        segment_start=segment_start.to(torch.int32),
        segment_slot=slots.to(torch.int32),
        num_base=num_base,
        max_segment=max(lengths.tolist(), default=0),
        max_span_rows=max_span_rows,
    )


def _draw_slots(
    popularity: Popularity, num_tokens: int, num_slots: int, generator: torch.Generator
) -> Tensor:
    if popularity == "distinct" or num_tokens == 0:
        slots = torch.randperm(num_tokens, generator=generator)
    elif popularity == "identical":
        slots = torch.full((num_tokens,), num_slots // 2)
    else:
        weights = torch.ones(num_slots)
        if popularity == "skewed":
            weights = weights / torch.arange(1, num_slots + 1) ** 2
        slots = torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    return slots.sort().values.to(torch.int32)


def _random_lora(
    rank: int, in_features: int, out_features: int, slot: int, generator: torch.Generator
) -> Lora:
    a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    b = torch.randn(out_features, rank, generator=generator) / rank**0.5
    return Lora(a, b, scaling=0.5 + 0.25 * slot)


def _matrix(
    num_rows: int, width: int, strided: bool, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    margin = 16 if strided else 0
    wide = torch.randn(num_rows, margin + width + margin, generator=generator).to(dtype)
    return wide[:, margin : margin + width]


def _max_span_rows(token_slot: Tensor, rows: RankRows, span: TargetSpan) -> int:
    slots = token_slot[token_slot >= 0].unique().long()
    if len(slots) == 0:
        return 0
    ptr = rows.row_ptr[slots]
    last = span.first + len(span.out_start) - 1
    return max(int((ptr[:, last] - ptr[:, span.first]).max()), OTHER_TARGET_ROWS)


def _pack(
    loras: dict[tuple[int, int], Lora],
    num_slots: int,
    in_features: int,
    out_widths: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, RankRows]:
    """Rank rows in NaN pages, in random order; two layers, the span in the second one."""
    num_targets = len(out_widths) + 2
    page_elements = 3 * row_elements(in_features, max(out_widths)) + 40
    counts = torch.zeros(num_slots, 2 * num_targets, dtype=torch.int32)
    packed: list[tuple[int, int, Tensor, float]] = []  # slot, row, a and b, scale
    for slot in range(num_slots):
        num_rows = 0
        for column in range(2 * num_targets):
            target = column - num_targets - 1
            if 0 <= target < len(out_widths):
                lora = loras.get((slot, target))
            else:
                lora = _random_lora(OTHER_TARGET_ROWS, 16, 16, slot, generator)
            if lora is None:
                continue
            for a, b in zip(lora.a, lora.b.T, strict=True):
                packed.append((slot, num_rows, _padded_row(a, b), lora.scaling))
                num_rows += 1
            counts[slot, column] = len(lora.a)
    row_ptr = torch.zeros(num_slots, 2 * num_targets + 1, dtype=torch.int32)
    row_ptr[:, 1:] = counts.cumsum(1)
    max_rows = int(row_ptr.max())
    row_offset = torch.zeros(num_slots, max_rows, dtype=torch.int64)
    row_scale = torch.full((num_slots, max_rows), torch.nan)
    pages: list[Tensor] = [torch.full((page_elements,), torch.nan)]  # a page of nobody's
    fill = page_elements
    for i in torch.randperm(len(packed), generator=generator).tolist():
        slot, row, elements, scale = packed[i]
        if fill + len(elements) > page_elements:
            pages.append(torch.full((page_elements,), torch.nan))
            fill = 0
        pages[-1][fill : fill + len(elements)] = elements
        row_offset[slot, row] = (len(pages) - 1) * page_elements + fill
        row_scale[slot, row] = scale
        fill += len(elements)
    return torch.stack(pages).to(dtype), RankRows(row_ptr, row_offset, row_scale)


def _padded_row(a: Tensor, b: Tensor) -> Tensor:
    row = torch.full((row_elements(len(a), len(b)),), torch.nan)
    row[: len(a)] = a
    row[aligned(len(a)) : aligned(len(a)) + len(b)] = b
    return row


# Sequences as (query tokens of the step, context after it).
TRAFFIC: dict[Traffic, tuple[tuple[int, int], ...]] = {
    "decode": ((1, 1), (1, 16), (1, 17), (1, 83), (1, 40)),
    "prefill": ((5, 5), (33, 33), (16, 16)),
    "chunked": ((7, 40), (20, 21), (16, 64)),
    "mixed": ((1, 19), (18, 18), (1, 70), (9, 50), (1, 1)),
}


@dataclass(frozen=True)
class AttentionCase:
    """The arguments of `paged_attention` and of `rope_store_kv` for one step."""

    qkv: Tensor  # [T, (H + 2K) * D]
    kv_cache: Tensor  # one layer's view of pages: [num_pages, 2, block_size, K, D]
    storage: Tensor  # [num_pages, page_elements]: the pages themselves, all layers
    index: AttentionIndex
    cos_sin: Tensor  # [max_positions, D] fp32
    positions: Tensor  # [T] int32
    kv_slot: Tensor  # [T] int64
    scale: float


def make_attention_case(
    *,
    traffic: Traffic = "mixed",
    sequences: tuple[tuple[int, int], ...] | None = None,
    num_heads: int = 9,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    block_size: int = 16,
    num_layers: int = 3,
    layer: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCase:
    """A step of the named traffic (or of (queries, context) pairs), its KV in scattered pages."""
    generator = torch.Generator().manual_seed(seed)
    sequences = TRAFFIC[traffic] if sequences is None else sequences
    page_shape = (num_layers, 2, block_size, num_kv_heads, head_dim)
    num_blocks = [-(-context // block_size) for _, context in sequences]
    num_pages = sum(num_blocks) + 3
    pages = (1 + torch.randperm(num_pages - 1, generator=generator)).tolist()
    storage = torch.full((num_pages, *page_shape), torch.nan, dtype=dtype)
    block_table = torch.zeros(len(sequences), max(num_blocks, default=1), dtype=torch.int32)
    positions, kv_slot, query_start = [], [], [0]
    for s, (num_queries, context) in enumerate(sequences):
        own = [pages.pop() for _ in range(num_blocks[s])]
        block_table[s, : len(own)] = torch.tensor(own)
        slots = [own[i // block_size] * block_size + i % block_size for i in range(context)]
        kv = torch.randn(context, num_layers, 2, num_kv_heads, head_dim, generator=generator)
        place = torch.tensor(slots)
        storage[place // block_size, :, :, place % block_size] = kv.to(dtype)
        positions += range(context - num_queries, context)
        kv_slot += slots[context - num_queries :]
        query_start.append(query_start[-1] + num_queries)
    queries = torch.tensor([num for num, _ in sequences], dtype=torch.int32)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    index = AttentionIndex(
        query_start=torch.tensor(query_start, dtype=torch.int32),
        context_len=torch.tensor([context for _, context in sequences], dtype=torch.int32),
        block_table=block_table,
        decode=torch.nonzero(queries == 1).flatten().to(torch.int32),
        prefill=torch.nonzero(queries != 1).flatten().to(torch.int32),
        max_query=max((num for num, _ in sequences), default=0),
        max_context=max((context for _, context in sequences), default=0),
    )
    return AttentionCase(
        qkv=torch.randn(query_start[-1], width, generator=generator).to(dtype),
        kv_cache=storage[:, layer],
        storage=storage.view(num_pages, -1),
        index=index,
        cos_sin=_cos_sin(index.max_context, head_dim),
        positions=torch.tensor(positions, dtype=torch.int32),
        kv_slot=torch.tensor(kv_slot, dtype=torch.int64),
        scale=head_dim**-0.5,
    )


def _cos_sin(num_positions: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(num_positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
