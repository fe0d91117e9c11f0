"""Which tiles of the adapter kernels are fastest on this GPU? Writes the table that they then use.

For the spans of the served models, ranks 8-128 and 1-512 tokens: BGMV with an adapter for each
token, SGMV with one segment. Every candidate is held against `kernels.reference` before it is
timed, in CUDA graphs whose calls read one adapter after the other, so that few are in the cache.
Needs a CUDA device, and takes a good while; without one it ends with status 2. --dry-run goes
through everything at a tiny size in Triton's interpreter, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import torch

from bench.record import machine
from bench.span_adapters import SpanAdapters
from kernels import reference
from kernels.triton.adapters import run_tiling
from kernels.triton.tiles import MAX_SPLITS, Method, Tile, rule_tiling, tiling, whole_splits
from kernels.triton.tuned import (
    DIRECTORY,
    Points,
    Shape,
    TunedTiles,
    shape_of,
    table_path,
    write_table,
)

CALLS = 20  # of one captured graph
REPLAYS = 5


@dataclass(frozen=True)
class Search:
    """What is tried, where, and what tells how many microseconds a call takes."""

    device: str
    dtype: torch.dtype
    spans: tuple[tuple[int, tuple[int, ...]], ...]  # inputs, output widths
    ranks: tuple[int, ...]
    steps: tuple[list[int], ...]  # tokens of each segment
    checked_steps: tuple[list[int], ...]  # one of each method
    num_slots: int
    columns: dict[Method, tuple[int, ...]]  # inputs and outputs of a tile
    measure: Callable[[Callable[[], None]], float]


def served(measure: Callable[[Callable[[], None]], float]) -> Search:
    """The spans q,k,v; o; gate,up; down of Llama-3-8B, Qwen2.5-7B and SmolLM2-135M."""
    shapes = ((4096, 1024, 14336), (3584, 512, 18944), (576, 192, 1536))  # hidden, kv, mlp
    spans = tuple(
        span
        for hidden, kv, mlp in shapes
        for span in (
            (hidden, (hidden, kv, kv)),
            (hidden, (hidden,)),
            (hidden, (mlp, mlp)),
            (mlp, (hidden,)),
        )
    )
    num_tokens = tuple(2**n for n in range(10))
    return Search(
        device="cuda",
        dtype=torch.bfloat16,
        spans=spans,
        ranks=(8, 16, 32, 64, 128),
        steps=(*([1] * n for n in num_tokens), *([n] for n in num_tokens if n >= 16)),
        checked_steps=([1, 3, 2], [33, 1, 16]),
        num_slots=64,
        columns={"bgmv": (256, 512, 1024), "sgmv": (64, 128)},
        measure=measure,
    )


def tiny() -> Search:
    """Everything once, in the interpreter."""

    def call_once(call: Callable[[], None]) -> float:
        call()
        return 1.0

    return Search(
        device="cpu",
        dtype=torch.float16,  # the interpreter multiplies no bf16
        spans=((24, (16, 8)),),
        ranks=(2,),
        steps=([1, 1], [17]),
        checked_steps=([1, 2], [18, 1]),
        num_slots=4,
        columns={"bgmv": (16,), "sgmv": (16,)},
        measure=call_once,
    )


def tune(search: Search) -> tuple[dict[Shape, Points], list[float]]:
    """The fastest tiles of every work, and how many times faster than the rules' each is."""
    table: dict[Shape, Points] = {}
    gains = []
    for (in_features, widths), rank in product(search.spans, search.ranks):
        adapters = SpanAdapters(
            in_features, widths, rank, search.num_slots, search.dtype, search.device
        )
        for method in search.columns:
            check(adapters, search, method)
        for lengths in search.steps:
            work = adapters.work(lengths)
            rule = rule_tiling(work)
            by_rule = search.measure(call(adapters, TunedTiles(*rule[1:4]), lengths))
            best, microseconds = fastest(adapters, search, lengths)
            points = table.setdefault(shape_of(work), {})
            points[work.num_tokens, work.max_span_rows] = best
            gains.append(by_rule / microseconds)
        print(f"{in_features} -> {widths}, rank {rank}: done", file=sys.stderr)
    return table, gains


def fastest(adapters: SpanAdapters, search: Search, lengths: list[int]) -> tuple[TunedTiles, float]:
    """The best shrink and splits beside the rules' expand, then the best expand beside those."""
    work = adapters.work(lengths)
    columns = search.columns[work.method]
    best = TunedTiles(*rule_tiling(work)[1:4])
    shrinks = [
        TunedTiles(shrink, best.expand, splits)
        for shrink in shrink_tiles(work.method, columns)
        for splits in split_counts(work.method, work.in_features, shrink)
    ]
    _, best = min((search.measure(call(adapters, tiles, lengths)), tiles) for tiles in shrinks)
    expands = [best._replace(expand=expand) for expand in expand_tiles(work.method, columns)]
    microseconds, best = min(
        (search.measure(call(adapters, tiles, lengths)), tiles) for tiles in expands
    )
    return best, microseconds


def shrink_tiles(method: Method, columns: tuple[int, ...]) -> Iterator[Tile]:
    """The candidates for shrink."""
    if method == "bgmv":
        for rows, inputs in product((4, 8), columns):
            yield Tile(1, rows, inputs, num_warps=max(rows * inputs // 512, 1), num_stages=1)
    else:
        for tokens, inputs in product((16, 32, 64), columns):
            yield Tile(tokens, 16, inputs, num_warps=4, num_stages=3)


def expand_tiles(method: Method, columns: tuple[int, ...]) -> Iterator[Tile]:
    """The candidates for expand."""
    if method == "bgmv":
        for rows, outputs in product((8, 16), columns):
            yield Tile(1, rows, outputs, num_warps=max(rows * outputs // 2048, 1), num_stages=1)
    else:
        for tokens, outputs in product((16, 32, 64), columns):
            yield Tile(tokens, 16, outputs, num_warps=4, num_stages=2)


def split_counts(method: Method, in_features: int, shrink: Tile) -> list[int]:
    """The numbers of splits that differ in fact."""
    wanted = (1, 2, 4, 8)[: MAX_SPLITS[method].bit_length()]
    return sorted({whole_splits(in_features, shrink.columns, splits) for splits in wanted})


def check(adapters: SpanAdapters, search: Search, method: Method) -> None:
    """Raise AssertionError naming the first tiles whose result is not the reference's."""
    (lengths,) = [n for n in search.checked_steps if adapters.work(n).method == method]
    index, arguments = adapters.index(lengths), (adapters.storage, adapters.rows)
    before, x = adapters.matrices(sum(lengths))
    expected = before.clone()
    reference.add_adapters(expected, x, *arguments, index, adapters.span)
    columns = search.columns[method]
    expands = list(expand_tiles(method, columns))
    for i, shrink in enumerate(shrink_tiles(method, columns)):
        for splits in split_counts(method, adapters.in_features, shrink):
            tiles = TunedTiles(shrink, expands[i % len(expands)], splits)
            out = before.clone()
            chosen = tiling(adapters.work(lengths), *tiles)
            run_tiling(chosen, out, x, *arguments, index, adapters.span)
            torch.testing.assert_close(
                out, expected, rtol=2**-7, atol=2**-6, msg=partial("{}: {}".format, tiles)
            )


def call(adapters: SpanAdapters, tiles: TunedTiles, lengths: list[int]) -> Callable[[], None]:
    """A step with these tiles; every call is of the next adapters."""
    out, x = adapters.matrices(sum(lengths))
    indices = [adapters.index(lengths, i * len(lengths)) for i in range(CALLS)]
    chosen, calls = tiling(adapters.work(lengths), *tiles), count()

    def run() -> None:
        index = indices[next(calls) % CALLS]
        run_tiling(chosen, out, x, adapters.storage, adapters.rows, index, adapters.span)

    return run


def graph_microseconds(call: Callable[[], None]) -> float:
    """The median time of a call, from replays of a graph of CALLS of them."""
    call()  # compiles; nothing may be compiled during a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    milliseconds = []
    for _ in range(REPLAYS):
        start, stop = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return 1000 * statistics.median(milliseconds) / CALLS


def main() -> None:
    """Search, write the table, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="a tiny search in the interpreter")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the table goes")
    options = parser.parse_args()
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton loads
        again = [sys.executable, "-m", "bench.tune_gpu", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | {"TRITON_INTERPRET": "1"})
    if not options.dry_run and not torch.cuda.is_available():
        sys.stderr.write(
            "tune_gpu measures on a CUDA device, and torch finds none here: run it on a machine "
            "with one, or add --dry-run to see that it works\n"
        )
        sys.exit(2)
    search = tiny() if options.dry_run else served(graph_microseconds)
    name = "dry run" if options.dry_run else torch.cuda.get_device_name()
    path = table_path(name, options.directory)
    table, gains = tune(search)
    about: dict[str, Any] = machine("cuda" if search.device == "cuda" else "cpu")
    write_table(path, about, table)
    speedup = statistics.geometric_mean(gains)
    print(json.dumps({"bench": "tune_gpu", **about, "file": str(path), "works": len(gains),
                      "mean_speedup_over_the_rules": speedup}))  # fmt: skip


if __name__ == "__main__":
    main()
