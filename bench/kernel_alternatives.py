"""Is one fused adapter kernel worth having, beside the obvious ways to compute the same?

One linear layer with D adapters over T tokens, computed by our `add_adapters` and by

loop      for each adapter: x[its tokens] Aᵀ Bᵀ, two small products
gather    A and B of every token's adapter copied out of padded stacks, then two `bmm`
padded    tokens of each adapter padded to the longest segment, two `bmm` over the adapters
merged    for each adapter: x[its tokens] (W + BA)ᵀ, weights merged beforehand; has the base in it

beside the base linear alone. Every way is held against dense fp32 products before it is timed.
Times are of single calls, made in turn, each on another layer's weights; on a GPU by CUDA events.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.adapter_step import AdapterStep, make_step
from bench.record import arguments, finish, spread, torch_device, whole_numbers
from kernels.ops import kernels_for
from server.model.linear import Linear

WAYS = ("ours", "loop", "gather", "padded", "merged")
MAX_STACK_BYTES = 1 << 30
TOLERANCE = 0.03
"""Largest error allowed, as a share of the largest expected value: bf16 rounds three times."""

BAR_SHAPE = (576, 960)
MAX_SHARE_OF_BASE = 0.20
MIN_SPEEDUP_OVER_GATHER = 10.0

Call = Callable[[int], Tensor]  # of a layer; [T, O]


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=whole_numbers, default=(1, 4, 8, 16, 32, 64, 128, 256))
    parser.add_argument("--ranks", type=whole_numbers, default=(8, 16, 32, 64))
    parser.add_argument("--in-features", type=int, default=BAR_SHAPE[0])
    parser.add_argument("--out-features", type=int, default=BAR_SHAPE[1])
    parser.add_argument("--layers", type=int, default=8, help="sets of weights to go round")
    parser.add_argument("--repeats", type=int, default=50)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every case and the stated bar; returns the record."""
    if options.quick:
        options.tokens, options.ranks, options.layers, options.repeats = (1, 4), (8,), 2, 2
        options.in_features, options.out_features = 64, 96
    device = torch_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
    rows = [
        measure(num_tokens, ranks, options, device, dtype)
        for num_tokens, ranks in cases(options.tokens, options.ranks)
    ]
    print(table(rows))
    numbers: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "rows": rows}
    if not options.quick:
        numbers["bars"] = [
            bar(measure(32, (16,) * 32, bar_options(options, layers), device, dtype), layers)
            for layers in (options.layers, 1)
        ]
    return finish("kernel_alternatives", device, options, numbers)


def bar_options(options: argparse.Namespace, layers: int) -> argparse.Namespace:
    """The options of the case that the bar is about."""
    shape = dict(zip(("in_features", "out_features"), BAR_SHAPE, strict=True))
    return argparse.Namespace(**vars(options) | shape | {"layers": layers})


def cases(tokens: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """(tokens, rank of each adapter) for 1, √T and T adapters, of one rank each and of all."""
    found = []
    for num_tokens in tokens:
        for num_adapters in sorted({1, math.isqrt(num_tokens), num_tokens}):
            found += [(num_tokens, (rank,) * num_adapters) for rank in ranks]
            if num_adapters > 1 and len(ranks) > 1:
                mixed = tuple(ranks[i % len(ranks)] for i in range(num_adapters))
                found.append((num_tokens, mixed))
    return found


def measure(
    num_tokens: int,
    ranks: tuple[int, ...],
    options: argparse.Namespace,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Microseconds of a call of each way and of the base; None for a way that took too much."""
    step = make_step(
        num_tokens,
        ranks,
        options.in_features,
        options.out_features,
        num_layers=options.layers,
        dtype=dtype,
        device=device,
    )
    calls = ways(step, device)
    check(step, calls)
    linears = [Linear(weight.contiguous()) for weight in step.weight]
    calls["base"] = lambda layer: linears[layer].forward(step.x)
    seconds = timed(calls, step.num_layers, options.repeats, device)
    micros = {way: spread([1e6 * x for x in seconds[way]]) for way in seconds}
    return {
        "num_tokens": num_tokens,
        "num_adapters": len(ranks),
        "ranks": sorted(set(ranks)),
        "shape": [options.in_features, options.out_features],
        "microseconds": {way: micros.get(way) for way in ("base", *WAYS)},
    }


def ways(step: AdapterStep, device: str) -> dict[str, Call]:
    """The ways as functions of a layer; all but merged add to the same zeros."""
    kernels, outs = kernels_for(device), step.x.new_zeros(len(step.x), step.weight.shape[1])
    slots = step.index.token_slot.long()
    places, mask = _padding(step)

    def ours(layer: int) -> Tensor:
        kernels.add_adapters(outs, step.x, step.storage, step.rows, step.index, step.span(layer))
        return outs

    def loop(layer: int) -> Tensor:
        for i, (start, stop) in enumerate(step.segments):
            a, b = step.a[layer, i, : step.ranks[i]], step.b[layer, i, :, : step.ranks[i]]
            outs[start:stop] += step.x[start:stop] @ a.T @ b.T
        return outs

    def gather(layer: int) -> Tensor:
        h = torch.bmm(step.a[layer][slots], step.x[:, :, None])
        return outs.add_(torch.bmm(step.b[layer][slots], h)[:, :, 0])

    def padded(layer: int) -> Tensor:
        h = torch.bmm(step.x[places], step.a[layer].transpose(1, 2))
        y = torch.bmm(h, step.b[layer].transpose(1, 2))
        return outs.add_(y[mask])

    found: dict[str, Call] = {"ours": ours, "loop": loop, "gather": gather, "padded": padded}
    if step.weight.nbytes * len(step.ranks) <= MAX_STACK_BYTES:
        found["merged"] = _merged(step)
    return found


def _padding(step: AdapterStep) -> tuple[Tensor, Tensor]:
    """The token at each place of [D, longest segment], and which places are no padding."""
    starts = step.index.segment_start.long()
    lengths = starts.diff()
    offset = torch.arange(step.index.max_segment, device=starts.device)
    return (starts[:-1, None] + offset).clamp(max=len(step.x) - 1), offset < lengths[:, None]


def _merged(step: AdapterStep) -> Call:
    weights = torch.stack([w + b @ a for w, a, b in zip(step.weight, step.a, step.b, strict=True)])

    return lambda layer: torch.cat(
        [
            torch.nn.functional.linear(step.x[start:stop], weight)
            for weight, (start, stop) in zip(weights[layer], step.segments, strict=True)
        ]
    )


def check(step: AdapterStep, calls: dict[str, Call]) -> None:
    """Raises RuntimeError where a way is not what dense products give."""
    layer = step.num_layers - 1
    expected = step.expected(layer)
    base = step.x.float() @ step.weight[layer].float().T
    for name, call in calls.items():
        if name != "merged":
            call(layer).zero_()  # the sum of earlier calls
        found = call(layer).float() + (0 if name == "merged" else base)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name} is off by {error:.3f} of the largest value")


def timed(
    calls: dict[str, Call], num_layers: int, repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-1, repeats):
        for name, call in calls.items():
            layer = (repeat + 1) % num_layers
            duration = _seconds_on_gpu(call, layer) if device == "cuda" else _seconds(call, layer)
            if repeat >= 0:
                seconds[name].append(duration)
    return seconds


def _seconds(call: Call, layer: int) -> float:
    begin = time.perf_counter()
    call(layer)
    return time.perf_counter() - begin


def _seconds_on_gpu(call: Call, layer: int) -> float:
    begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    begin.record()
    call(layer)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def bar(row: dict[str, Any], layers: int) -> dict[str, Any]:
    """BGMV of 32 tokens and adapters, r = 16, beside the base linear and gather + bmm."""
    micros = {way: found["median"] for way, found in row["microseconds"].items() if found}
    share, speedup = micros["ours"] / micros["base"], micros["gather"] / micros["ours"]
    print(
        f"bar, 32 tokens, 32 adapters, r = 16, 576 -> 960, weights of {layers} layers in turn: "
        f"{share:.1%} of the base linear beside it (at most {MAX_SHARE_OF_BASE:.0%}), "
        f"{speedup:.1f} x gather + bmm (at least {MIN_SPEEDUP_OVER_GATHER:.0f})"
    )
    return {
        "layers": layers,
        "microseconds": micros,
        "share_of_base": share,
        "speedup_over_gather": speedup,
        "holds": share <= MAX_SHARE_OF_BASE and speedup >= MIN_SPEEDUP_OVER_GATHER,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Median microseconds, for people."""
    lines = ["tokens adapters   ranks       base" + "".join(f"{way:>11}" for way in WAYS)]
    for row in rows:
        ranks = "mixed" if len(row["ranks"]) > 1 else str(row["ranks"][0])
        cells = [
            "-" if found is None else f"{found['median']:.1f}"
            for found in row["microseconds"].values()
        ]
        start = f"{row['num_tokens']:>6} {row['num_adapters']:>8} {ranks:>7}"
        lines.append(start + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
