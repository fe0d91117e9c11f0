"""The decoder of every supported family: configuration decides what differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from adapters_store.layout import TARGET_PATHS
from kernels.layout import RowReads, TargetSpan
from server.model.linear import Linear
from server.model.rope import cos_sin_table

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.layout import AdapterIndex, AttentionIndex, RankRows
    from kernels.ops import Kernels
    from server.model.config import ModelConfig
    from server.model.weights import LayerWeights, Weights


class StepInput(NamedTuple):
    """One step's tokens of all sequences, ordered by slot, as the model sees them."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32
    kv_slot: Tensor  # [T] int64: page * block_size + offset where the token's k and v go
    logit_rows: Tensor  # [N] int64: the tokens whose next-token logits are wanted
    attention: AttentionIndex
    adapters: AdapterIndex
    rows: RankRows  # of the resident adapters
    storage: Tensor  # [num_pages, page_elements]: the page pool


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer, ready to run, with the adapter span of each of its projections."""

    input_norm: Tensor
    qkv: Linear
    qkv_span: TargetSpan
    q_norm: Tensor | None
    k_norm: Tensor | None
    cos_sin: Tensor | None  # None: the layer has no positions
    window: int  # 0 = all
    o: Linear
    o_span: TargetSpan
    post_norm: Tensor
    gate_up: Linear
    gate_up_span: TargetSpan
    down: Linear
    down_span: TargetSpan


class Decoder:
    """A pre-norm decoder with the adapters of a step added to each of its projections.

    Holds weights only: the KV cache and the adapters lie in the pages that each step brings. A
    page is [num_layers, 2, block_size, num_kv_heads, head_dim], in the model's dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        *,
        int8: bool = False,
    ) -> None:
        """Move the weights to `device`, in `dtype`; empties `weights.layers` on the way.

        `int8` keeps the weights of all linear layers in 8 bits.
        """
        self.config = config
        self._kernels = kernels
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._embedding = weights.embedding.to(device, dtype)
        cos_sin = cos_sin_table(config.rope, config.max_context, device)
        self._layers: list[_Layer] = []
        while weights.layers:
            layer = weights.layers.pop(0)
            for name, tensor in vars(layer).items():
                setattr(layer, name, None if tensor is None else tensor.to(device, dtype))
            self._layers.append(_build_layer(config, len(self._layers), layer, cos_sin, int8))
        self._norm = weights.norm.to(device, dtype)
        is_tied = weights.head is weights.embedding
        head = self._embedding if is_tied else weights.head.to(device, dtype)
        self._head = Linear(head, int8=int8)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        """Next-token logits [N, vocab] fp32 of `step.logit_rows`, in that order.

        Stores the k and v of all T tokens in `step.storage`. The residual stream is rounded to
        the model's dtype after every addition, as transformers does.
        """
        kernels, eps = self._kernels, self._eps
        kv_caches = self._kv_caches(step.storage)
        residual = self._embedding[step.token_ids]  # [T, hidden]
        x = kernels.rms_norm(residual, self._layers[0].input_norm, eps)
        for n, layer in enumerate(self._layers):
            if n > 0:
                x = kernels.add_rms_norm(x, residual, layer.input_norm, eps)
            x = self._attend(layer, x, kv_caches[:, n], step)
            x = kernels.add_rms_norm(x, residual, layer.post_norm, eps)
            x = self._feed_forward(layer, x, step)
        x, residual = x[step.logit_rows], residual[step.logit_rows]  # [N, hidden]
        if x.shape[0] == 0:
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float)
        return self._head.forward(kernels.add_rms_norm(x, residual, self._norm, eps), torch.float)

    def _attend(self, layer: _Layer, x: Tensor, kv_cache: Tensor, step: StepInput) -> Tensor:
        """o(attention(qkv(x))): [T, hidden] to [T, hidden]."""
        kernels = self._kernels
        qkv = self._project(layer.qkv, layer.qkv_span, x, step)
        kernels.rope_store_kv(
            qkv,
            layer.cos_sin,
            step.positions,
            kv_cache,
            step.kv_slot,
            layer.q_norm,
            layer.k_norm,
            self._eps,
        )
        heads = kernels.paged_attention(qkv, kv_cache, step.attention, self._scale, layer.window)
        return self._project(layer.o, layer.o_span, heads, step)

    def _feed_forward(self, layer: _Layer, x: Tensor, step: StepInput) -> Tensor:
        """down(silu(gate(x)) · up(x)): [T, hidden] to [T, hidden]."""
        gate_up = self._project(layer.gate_up, layer.gate_up_span, x, step)
        return self._project(layer.down, layer.down_span, self._kernels.silu_mul(gate_up), step)

    def _project(self, linear: Linear, span: TargetSpan, x: Tensor, step: StepInput) -> Tensor:
        """W x + b + ΔW[slot] x of every token: [T, in_features] to [T, out_features]."""
        if step.adapters.max_segment == 0:
            return linear.forward(x)
        reads = RowReads(step.storage, step.rows, step.adapters, span, x.shape[1])
        out = linear.forward(x, reads=reads)
        self._kernels.add_adapters(out, x, step.storage, step.rows, step.adapters, span)
        return out

    def _kv_caches(self, storage: Tensor) -> Tensor:
        """The pages as KV blocks: [num_pages, layers, 2, block_size, num_kv_heads, head_dim]."""
        config = self.config
        shape = (len(storage), config.num_layers, 2, -1, config.num_kv_heads, config.head_dim)
        return storage.view(shape)


def _build_layer(
    config: ModelConfig, n: int, weights: LayerWeights, cos_sin: Tensor, int8: bool
) -> _Layer:
    features = [target.out_features for target in config.target_shapes()]

    def span(first: int, stop: int) -> TargetSpan:
        """Targets `first` to `stop` of TARGET_PATHS in layer n."""
        out_start = [0]
        for out_features in features[first:stop]:
            out_start.append(out_start[-1] + out_features)
        return TargetSpan(n * len(TARGET_PATHS) + first, tuple(out_start))

    return _Layer(
        input_norm=weights.input_norm,
        qkv=Linear(weights.qkv, weights.qkv_bias, int8=int8),
        qkv_span=span(0, 3),
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        cos_sin=cos_sin if config.layer_rotates[n] else None,
        window=config.layer_windows[n],
        o=Linear(weights.o, weights.o_bias, int8=int8),
        o_span=span(3, 4),
        post_norm=weights.post_norm,
        gate_up=Linear(weights.gate_up, weights.gate_up_bias, int8=int8),
        gate_up_span=span(4, 6),
        down=Linear(weights.down, weights.down_bias, int8=int8),
        down_span=span(6, 7),
    )
