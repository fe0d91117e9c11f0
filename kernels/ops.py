"""The public operations, and the choice of their implementation by device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.layout import AdapterIndex, AttentionIndex, RankRows, TargetSpan


class Kernels(Protocol):
    """What every implementation offers; `kernels.reference` says what each operation means."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos_sin: Tensor | None,
        positions: Tensor,
        kv_cache: Tensor,
        kv_slot: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None: ...

    def paged_attention(
        self,
        qkv: Tensor,
        kv_cache: Tensor,
        index: AttentionIndex,
        scale: float,
        window: int = 0,
    ) -> Tensor: ...

    def add_adapters(
        self,
        out: Tensor,
        x: Tensor,
        storage: Tensor,
        rows: RankRows,
        index: AdapterIndex,
        span: TargetSpan,
    ) -> None: ...


def kernels_for(device_type: str) -> Kernels:
    """The implementation that serves tensors on `device_type`; ValueError for an unknown one."""
    if device_type == "cpu":
        import kernels.cpu.ops as cpu

        return cast(Kernels, cpu)
    if device_type == "cuda":
        import kernels.triton.ops as triton

        return cast(Kernels, triton)
    raise ValueError(f"no kernels for device {device_type!r}: use 'cpu' or 'cuda'")
