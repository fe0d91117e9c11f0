"""What the engine will be: model, device, dtype, page geometry and limits, settled from settings.

Known before any weight is read, and to both processes: the store packs adapters for its layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from adapters_store.layout import TARGET_PATHS
from adapters_store.packing import check_layout
from server.engine.overload import QueueLimits
from server.memory.image_loader import LoadLimits
from server.memory.page_pool import PageGeometry, choose_block_size
from server.model.config import ModelError
from server.model.linear import can_serve_int8
from server.model.source import resolve_source
from server.model.weights import read_config

if TYPE_CHECKING:
    from adapters_store.layout import BaseLayout
    from server.config import Settings
    from server.model.config import ModelConfig
    from server.model.source import ModelSource

MAX_CPU_POOL_BYTES = 2 << 30
CPU_POOL_SHARE, GPU_POOL_SHARE = 0.25, 0.9

MAX_HOST_BYTES = 32 << 30
HOST_SHARE = 0.25
"""Of the memory that is free at start, for images of adapters beside a GPU."""

OPERATIONS_PER_SECOND = {"cpu": 1e11, "cuda": 1.5e14}
"""What a prefill reaches: two to four cores with AVX-512, half of an A100's peak in 16 bits."""

LOAD_BYTES_PER_SECOND = {"cpu": 2e9, "cuda": 1e10}
"""A copy out of the page cache; pinned memory over PCIe 4. Only the ratio to the line above counts,
and only roughly: it decides between a cached prefix and an adapter that are used about as often.
A page of keys is worth 100 uses of a page of an adapter with SmolLM2 on a CPU, 2 with Llama-7B on
an A100."""

LOAD_THREADS = {"cpu": 2, "cuda": 4}
"""On a CPU a thread that copies takes a core from the steps; the second goes on beside one whose
read hangs. Beside a GPU they only wait, and the scheduler asks for 4 loads at once."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that the engine process needs to know."""

    source: ModelSource
    config: ModelConfig
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32", "bfloat16" or "float16"
    int8: bool  # weights of the base model in 8 bits
    geometry: PageGeometry
    pool_bytes: int | None  # None: by what is free once the weights are there
    max_context: int
    max_num_seqs: int
    max_batched_tokens: int
    max_passes: int
    queue_limits: QueueLimits
    max_adapters: int
    max_adapter_rank: int
    cuda_graphs: bool  # without effect on a CPU
    prefix_cache: bool
    adapter_memory_share: float | None  # of the pool, for adapters alone; None: all is shared
    loads: LoadLimits

    @property
    def layout(self) -> BaseLayout:
        """What packed adapters depend on."""
        return self.config.layout(self.geometry.page_elements, self.dtype)

    @property
    def page_bytes(self) -> int:
        return self.geometry.page_elements * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def attention_context(self) -> int:
        """Context whose attention takes a token about as long as its products with the weights.

        By multiplications, those of attention counted twice: no machine does them as fast.
        """
        config = self.config
        products = sum(t.in_features * t.out_features for t in config.target_shapes())
        return max(1, products // (2 * config.num_heads * config.head_dim) // 2)

    @property
    def compute_seconds(self) -> float:
        """About how long it takes to compute the keys and values of a page again.

        Two operations for each weight and token; attention is left out, which is little of it.
        """
        targets = sum(t.in_features * t.out_features for t in self.config.target_shapes())
        num_operations = 2 * self.config.num_layers * targets * self.geometry.block_size
        return num_operations / OPERATIONS_PER_SECOND[self.device]

    @property
    def load_seconds(self) -> float:
        """About how long it takes to load a page of an adapter again."""
        rate = LOAD_BYTES_PER_SECOND[self.device]
        return self.page_bytes / min(rate, self.loads.bytes_per_second or rate)

    @property
    def max_rows(self) -> int:
        """Most rank rows of one adapter: the highest rank in every target of every layer."""
        return self.max_adapter_rank * self.config.num_layers * len(TARGET_PATHS)

    def num_pages(self) -> int:
        """Pages of the pool on this machine now; ModelError when they are too few to serve."""
        num_bytes = self.pool_bytes or _default_pool_bytes(self.device)
        num_pages = num_bytes // self.page_bytes
        if num_pages * self.geometry.block_size < 2:
            raise ModelError(
                f"a pool of {num_bytes} bytes holds {num_pages} pages of {self.page_bytes} bytes: "
                "give it more (pool_bytes)"
            )
        return num_pages


def engine_spec(settings: Settings) -> EngineSpec:
    """Settle what the settings leave open; raises ModelError for what cannot be served."""
    source = resolve_source(settings.model)
    config = read_config(source)
    device = _device(settings.device)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    block_size = settings.block_size or choose_block_size(*shape, config.target_shapes())
    spec = EngineSpec(
        source=source,
        config=config,
        device=device,
        dtype=_dtype(settings.dtype, device),
        int8=settings.quantization == "int8",
        geometry=PageGeometry(*shape, block_size),
        pool_bytes=settings.pool_bytes,
        max_context=_max_context(settings.max_context, config),
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        max_passes=settings.max_passes,
        queue_limits=QueueLimits(settings.max_queue, settings.max_queue_per_adapter),
        max_adapters=settings.max_adapters,
        max_adapter_rank=settings.max_adapter_rank,
        cuda_graphs=settings.cuda_graphs,
        prefix_cache=settings.prefix_cache,
        adapter_memory_share=settings.adapter_memory_share,
        loads=_load_limits(settings, device),
    )
    if 0 < spec.loads.host_bytes < spec.page_bytes:
        raise ModelError(
            f"host_memory_bytes {spec.loads.host_bytes} is less than a page of {spec.page_bytes} "
            "bytes: raise it, or set it to 0 to keep no adapters in host memory"
        )
    if spec.int8 and (spec.dtype != "bfloat16" or not can_serve_int8(device)):
        raise ModelError(
            f"quantization 'int8' is served in bfloat16 on a CPU with AVX512-VNNI and AVX512-BF16, "
            f"not in {spec.dtype} on this {device!r}: use 'none'"
        )
    try:
        check_layout(spec.layout)
    except ValueError as error:
        raise ModelError(f"block_size {block_size} does not do: {error}") from error
    return spec


def _device(wanted: str) -> str:
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ModelError("device 'cuda' was asked for, and torch finds none: use 'cpu' or 'auto'")
    if wanted == "auto":
        return "cuda" if has_cuda else "cpu"
    return wanted


def _dtype(wanted: str, device: str) -> str:
    if device == "cpu" and wanted == "float16":
        raise ModelError("dtype 'float16' is not served on a CPU: use 'bfloat16' or 'float32'")
    if wanted != "auto":
        return wanted
    if device == "cuda" or _has_bfloat16():
        return "bfloat16"
    return "float32"


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; emulated it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _max_context(wanted: int | None, config: ModelConfig) -> int:
    if wanted is not None and wanted > config.max_context:
        raise ModelError(
            f"max_context {wanted} is above the {config.max_context} tokens that {config.name} "
            "was made for: lower it"
        )
    return wanted or config.max_context


def _load_limits(settings: Settings, device: str) -> LoadLimits:
    host_bytes = settings.host_memory_bytes
    return LoadLimits(
        num_threads=settings.load_threads or LOAD_THREADS[device],
        host_bytes=_default_host_bytes(device) if host_bytes is None else host_bytes,
        bytes_per_second=settings.load_bytes_per_second,
        timeout_seconds=settings.load_timeout_seconds,
    )


def _default_host_bytes(device: str) -> int:
    """None beside a CPU: the file is in the page cache already, a copy of ours would be a second.

    A GPU copies from pinned memory only, which the page cache is not.
    """
    if device == "cpu":
        return 0
    return min(MAX_HOST_BYTES, int(HOST_SHARE * psutil.virtual_memory().available))


def _default_pool_bytes(device: str) -> int:
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(GPU_POOL_SHARE * free)
    return min(MAX_CPU_POOL_BYTES, int(CPU_POOL_SHARE * psutil.virtual_memory().available))
