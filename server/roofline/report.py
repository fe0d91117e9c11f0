"""A plan as people read it, aligned tables, and as programs do, one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from server.roofline.capacity import POOL_SHARE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.roofline.bound import KernelBound, StepBound
    from server.roofline.capacity import Capacity
    from server.roofline.plan import Plan

NATURE = "A bound by arithmetic, measured nowhere: a real step takes longer, see docs/planning.md."


def to_text(plan: Plan) -> str:
    """Tables for people; times in ms, memory in GB (10^9 bytes)."""
    gpu, shape, work = plan.hardware, plan.shape, plan.workload
    prompts = plan.prefill.step
    sections = [
        f"{shape.name}, 16 bits, on {gpu.name}: {gpu.memory_bytes / 1e9:g} GB of memory at "
        f"{gpu.bytes_per_second / 1e9:g} GB/s, {gpu.flops_per_second / 1e12:g} TFLOPS, "
        f"{gpu.cache_bytes / 2**20:g} MiB of cache\n{NATURE}\n",
        _memory(plan),
        f"Decode step: sequences: {work.batch}, of {work.context} tokens each, "
        f"distinct adapters: {work.num_adapters}\n\n{_kernels(plan.decode)}",
        f"Prefill step: {prompts.num_tokens} tokens, prompts: {len(prompts.queries)}, "
        f"distinct adapters: {len(prompts.used_ranks)}\n\n{_kernels(plan.prefill)}",
        f"Retention of the decode step\n\n{_retention(plan)}",
    ]
    return "\n".join(sections)


def to_json(plan: Plan) -> str:
    """One line; times in seconds, memory in bytes, every kernel a row."""
    memory = plan.capacity
    return json.dumps(
        {
            "nature": NATURE,
            "hardware": asdict(plan.hardware),
            "model": {**asdict(plan.shape), "num_parameters": plan.shape.num_parameters},
            "workload": asdict(plan.workload),
            "memory": {
                **asdict(memory),
                "pool_bytes": memory.pool_bytes,
                "reserve_bytes": memory.reserve_bytes,
                "kv_bytes_per_token": plan.shape.kv_bytes_per_token,
                "kv_pages": memory.kv_pages,
                "fits": memory.fits,
                "adapters_that_fit": memory.adapters_that_fit,
                "kv_tokens_that_fit": memory.kv_tokens_that_fit,
            },
            "decode": _step_object(plan.decode),
            "prefill": _step_object(plan.prefill),
            "by_distinct_adapters": [
                {"num_adapters": n, **_totals(bound)} for n, bound in plan.by_distinct
            ],
        }
    )


def _memory(plan: Plan) -> str:
    memory, work = plan.capacity, plan.workload
    parameters = f"{plan.shape.num_parameters / 1e9:.2f} billion parameters"
    page = f"{memory.num_pages} pages of {_mib(memory.page_bytes)}, each the KV cache of "
    kv = f"{memory.num_seqs} sequences × {memory.blocks_per_seq} blocks = {memory.kv_pages} pages"
    rows = [
        ("weights", _gb(memory.weight_bytes), parameters),
        ("reserve", _gb(memory.reserve_bytes), f"{1 - POOL_SHARE:.0%} of what the weights leave"),
        ("page pool", _gb(memory.pool_bytes), f"{page}{memory.block_size} tokens"),
        ("KV cache of the batch", _gb(memory.kv_pages * memory.page_bytes), kv),
        (
            "adapters of the batch",
            _gb(memory.adapter_pages * memory.page_bytes),
            f"{work.num_adapters} adapters = {memory.adapter_pages} pages",
        ),
    ]
    for size in dict.fromkeys(memory.sizes):
        tokens = size.num_pages * memory.block_size
        pages = f"{size.num_pages} pages = {tokens} tokens of KV cache"
        rows.append((f"one adapter of rank {size.rank}", _mib(size.row_bytes), pages))
    return (
        f"{_table(rows, 'lrl')}\n{_fit(memory)}\n"
        f"Beside this KV cache {memory.adapters_that_fit} adapters fit; beside these adapters "
        f"{memory.kv_tokens_that_fit} tokens of KV cache.\n"
    )


def _fit(memory: Capacity) -> str:
    kv, adapters = memory.kv_pages, memory.adapter_pages
    wanted = f"{kv} pages of KV cache + {adapters} of adapters = {kv + adapters}"
    if memory.fits:
        return f"Fits: {wanted}, the pool has {memory.num_pages}."
    if memory.num_pages == 0:
        return (
            f"DOES NOT FIT: weights of {_gb(memory.weight_bytes)} leave no page in "
            f"{_gb(memory.memory_bytes)} of memory: take a larger GPU or a smaller model."
        )
    return (
        f"DOES NOT FIT: {wanted}, the pool has {memory.num_pages}: lower --batch, --context or "
        "--adapters, or take a larger GPU."
    )


def _kernels(bound: StepBound) -> str:
    rows: list[tuple[str, ...]] = [
        ("kernel", "launches", "MB", "GFLOP", "FLOP/byte", "limit", "ms")
    ]
    rows += [_kernel_row(kernel) for kernel in (*bound.base, *bound.adapters)]
    for name, kernels in (("base", bound.base), ("adapters", bound.adapters)):
        num_bytes = sum(kernel.num_bytes for kernel in kernels)
        flops = sum(kernel.cost.flops for kernel in kernels)
        launches = sum(kernel.cost.launches for kernel in kernels)
        seconds = sum(kernel.seconds for kernel in kernels)
        rows.append(_row(name, launches, num_bytes, flops, "", f"{seconds * 1e3:.2f}"))
    return f"{_table(rows, 'lrrrrlr')}retention {bound.retention:.1%}\n"


def _kernel_row(kernel: KernelBound) -> tuple[str, ...]:
    cost = kernel.cost
    time = f"{kernel.seconds * 1e3:.4f}"
    return _row(cost.name, cost.launches, kernel.num_bytes, cost.flops, kernel.limit, time)


def _row(
    name: str, launches: int, num_bytes: int, flops: int, limit: str, time: str
) -> tuple[str, ...]:
    intensity = f"{flops / num_bytes:.1f}" if num_bytes else ""
    numbers = f"{launches}", f"{num_bytes / 1e6:.1f}", f"{flops / 1e9:.2f}"
    return (name, *numbers, intensity, limit, time)


def _retention(plan: Plan) -> str:
    rows = [("distinct adapters", "base ms", "adapters ms", "retention")]
    for n, bound in plan.by_distinct:
        base, adapters = bound.base_seconds * 1e3, bound.adapter_seconds * 1e3
        rows.append((f"{n}", f"{base:.2f}", f"{adapters:.2f}", f"{bound.retention:.1%}"))
    return _table(rows, "rrrr")


def _step_object(bound: StepBound) -> dict[str, Any]:
    return {
        "num_tokens": bound.step.num_tokens,
        "num_adapters": len(bound.step.used_ranks),
        **_totals(bound),
        "base": [_kernel_object(kernel) for kernel in bound.base],
        "adapters": [_kernel_object(kernel) for kernel in bound.adapters],
    }


def _kernel_object(kernel: KernelBound) -> dict[str, Any]:
    moved = {"num_bytes": kernel.num_bytes, "seconds": kernel.seconds, "limit": kernel.limit}
    return {**asdict(kernel.cost), **moved}


def _totals(bound: StepBound) -> dict[str, float]:
    return {
        "base_seconds": bound.base_seconds,
        "adapter_seconds": bound.adapter_seconds,
        "retention": bound.retention,
    }


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _mib(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.4g} KiB"
    return f"{num_bytes / 2**20:.4g} MiB"


def _table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Columns two spaces apart, "l" or "r" for each; every line ends."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignment))]
    sides = {"l": str.ljust, "r": str.rjust}
    lines = (
        "  ".join(sides[a](cell, w) for cell, w, a in zip(row, widths, alignment, strict=True))
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)
