"""Random adapters of one rank on one span, on a device, and the steps that use them."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from kernels.layout import AdapterIndex, RankRows, TargetSpan, row_elements
from kernels.triton.tiles import MAX_SPAN_TARGETS, Work


class SpanAdapters:
    """`num_slots` adapters of rank `rank` in each target of a span.

    The steps are those of adapters on all linear layers: q,k,v have three times the rank in rows.
    """

    def __init__(
        self,
        in_features: int,
        widths: tuple[int, ...],
        rank: int,
        num_slots: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.in_features, self.num_slots = in_features, num_slots
        self.span = TargetSpan(0, (0, *accumulate(widths)))
        self.max_span_rows = MAX_SPAN_TARGETS * rank
        self._generator = torch.Generator(device).manual_seed(0)
        self._dtype, self._device = dtype, device
        num_rows = num_slots * len(widths) * rank
        size = row_elements(in_features, max(widths))
        self.storage = self._random(num_rows, size) / math.sqrt(in_features)
        ptr = torch.arange(len(widths) + 1, dtype=torch.int32, device=device) * rank
        offset = torch.arange(num_rows, device=device).view(num_slots, -1) * size
        scale = torch.full(offset.shape, 2.0, device=device)
        self.rows = RankRows(ptr.repeat(num_slots, 1), offset, scale)

    def matrices(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """out [T, O] and x [T, I] of a step."""
        out = self._random(num_tokens, self.span.out_start[-1])
        return out, self._random(num_tokens, self.in_features)

    def index(self, lengths: list[int], first_slot: int = 0) -> AdapterIndex:
        """A step of segments of these lengths, in the slots from first_slot on."""
        tensor = partial(torch.tensor, dtype=torch.int32, device=self.storage.device)
        slots = sorted((first_slot + i) % self.num_slots for i in range(len(lengths)))
        return AdapterIndex(
            token_slot=tensor([s for s, n in zip(slots, lengths, strict=True) for _ in range(n)]),
            segment_start=tensor([0, *accumulate(lengths)]),
            segment_slot=tensor(slots),
            num_base=0,
            max_segment=max(lengths),
            max_span_rows=self.max_span_rows,
        )

    def work(self, lengths: list[int]) -> Work:
        """What the choice of tiles sees of such a step."""
        return Work(
            num_tokens=sum(lengths),
            num_segments=len(lengths),
            max_segment=max(lengths),
            max_span_rows=self.max_span_rows,
            in_features=self.in_features,
            out_start=self.span.out_start,
            itemsize=self.storage.itemsize,
        )

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=self._dtype, device=self._device)
