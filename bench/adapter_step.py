"""One step's adapter work with random weights: packed as the server packs it, and as stacks.

For comparing ways to compute the same thing; every layer has weights of its own, so that no way
finds them in the cache where a server would not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import AdapterIndex, RankRows, TargetSpan, aligned, row_elements

SCALING = 0.5


@dataclass(frozen=True, slots=True)
class AdapterStep:
    """T tokens spread evenly over D adapters, ordered by slot, for L layers of one I -> O linear.

    A and B of adapters below the highest rank R are padded with zeros in the stacks; the packed
    form has no padding. All tensors but the index are of one dtype; all are on one device.
    """

    x: Tensor  # [T, I]
    weight: Tensor  # [L, O, I]: the base linear
    a: Tensor  # [L, D, R, I]
    b: Tensor  # [L, D, O, R], scaling included
    ranks: tuple[int, ...]  # [D]
    segments: tuple[tuple[int, int], ...]  # [D]: first token and the one after the last
    storage: Tensor  # [pages, elements]
    rows: RankRows
    index: AdapterIndex

    @property
    def num_layers(self) -> int:
        return len(self.weight)

    def span(self, layer: int) -> TargetSpan:
        """What `add_adapters` is told of a layer."""
        return TargetSpan(first=layer, out_start=(0, self.weight.shape[1]))

    def expected(self, layer: int) -> Tensor:
        """x Wᵀ + Σ x Aᵀ Bᵀ by dense products in fp32; [T, O] fp32."""
        x, out = self.x.float(), []
        for (start, stop), a, b in zip(self.segments, self.a[layer], self.b[layer], strict=True):
            dense = self.weight[layer].float() + b.float() @ a.float()
            out.append(x[start:stop] @ dense.T)
        return torch.cat(out)


def make_step(
    num_tokens: int,
    ranks: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    num_layers: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
) -> AdapterStep:
    """Adapter i has ranks[i]; ValueError for more adapters than tokens."""
    num_adapters, max_rank = len(ranks), max(ranks)
    if num_adapters > num_tokens:
        raise ValueError(
            f"{num_adapters} adapters for {num_tokens} tokens: give every adapter a token"
        )
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, scale: float) -> Tensor:
        wide = torch.randn(shape, generator=generator, device=device)
        return (wide * scale).to(dtype)

    a = randn(num_layers, num_adapters, max_rank, in_features, scale=in_features**-0.5)
    b = randn(num_layers, num_adapters, out_features, max_rank, scale=SCALING * max_rank**-0.5)
    for i, rank in enumerate(ranks):
        a[:, i, rank:] = 0
        b[:, i, :, rank:] = 0
    bounds = [num_tokens * i // num_adapters for i in range(num_adapters + 1)]
    storage, rows = _packed(a, b, ranks)
    return AdapterStep(
        x=randn(num_tokens, in_features, scale=1.0),
        weight=randn(num_layers, out_features, in_features, scale=in_features**-0.5),
        a=a,
        b=b,
        ranks=tuple(ranks),
        segments=tuple(itertools.pairwise(bounds)),
        storage=storage,
        rows=rows,
        index=_index(bounds, max_rank, device),
    )


def _packed(a: Tensor, b: Tensor, ranks: Sequence[int]) -> tuple[Tensor, RankRows]:
    """Rank rows in pages of eight, an adapter's layers one after the other, as a load packs it."""
    num_layers, _, max_rank, in_features = a.shape
    width = row_elements(in_features, b.shape[2])
    num_rows = sum(ranks) * num_layers
    storage = a.new_zeros(-(-num_rows // 8), 8 * width)
    flat = storage.view(-1, width)
    row_ptr = torch.zeros(len(ranks), num_layers + 1, dtype=torch.int32)
    row_offset = torch.zeros(len(ranks), num_layers * max_rank, dtype=torch.int64)
    row_scale = torch.zeros(len(ranks), num_layers * max_rank)
    at = 0
    for i, rank in enumerate(ranks):
        own = slice(at, at + num_layers * rank)
        flat[own, :in_features] = a[:, i, :rank].reshape(-1, in_features)
        columns = b[:, i, :, :rank].transpose(1, 2) / SCALING
        flat[own, aligned(in_features) :][:, : b.shape[2]] = columns.reshape(-1, b.shape[2])
        row_ptr[i] = torch.arange(num_layers + 1) * rank
        row_offset[i, : num_layers * rank] = torch.arange(own.start, own.stop) * width
        row_scale[i, : num_layers * rank] = SCALING
        at = own.stop
    device = a.device
    return storage, RankRows(row_ptr.to(device), row_offset.to(device), row_scale.to(device))


def _index(bounds: Sequence[int], max_rank: int, device: str) -> AdapterIndex:
    starts = torch.tensor(bounds, dtype=torch.int32)
    slots = torch.arange(len(bounds) - 1, dtype=torch.int32)
    return AdapterIndex(
        token_slot=slots.repeat_interleave(starts.diff()).to(device),
        segment_start=starts.to(device),
        segment_slot=slots.to(device),
        num_base=0,
        max_segment=int(starts.diff().max()),
        max_span_rows=max_rank,
    )
