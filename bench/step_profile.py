"""Where does a step's time go? Each operation of a decode and of a prefill step, and its share.

The parts of the engine that compute a step run in this process, on steps that its scheduler
planned and that are held at one context. In every round each step is run as it is; then with a
timer around each operation; then its linear layers alone, one after the other in a tight loop, each
with its own weight as in the step. Figures are medians over rounds. Shares are of the step with
timers and of its scheduling. On a GPU a timer waits for the device at both ends, so the operations
cannot overlap, and steps are launched without CUDA graphs.

Before anything is timed, each operation is held against the reference kernel.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from bench.engine_session import store_adapters
from bench.held_steps import Case, HeldStep, StepEngine
from bench.record import (
    add_model_flag,
    arguments,
    changed,
    engine_settings,
    finish,
    spread,
    whole_numbers,
)
from bench.step_check import MAX_ERROR, OPERATIONS, check
from bench.step_profile_table import REST, SCHEDULE, bars, report
from kernels.layout import RowReads
from kernels.ops import Kernels
from server.engine import batch, runner
from server.engine.spec import engine_spec
from server.model.linear import Linear

P = ParamSpec("P")
T = TypeVar("T")


class Gemm(NamedTuple):
    """One product of a step with a weight of the base model."""

    linear: Linear
    x: Tensor
    dtype: torch.dtype | None

    @property
    def label(self) -> str:
        return f"linear {self.linear.in_features} -> {self.linear.out_features}"

    @property
    def num_flops(self) -> int:
        return 2 * len(self.x) * self.linear.in_features * self.linear.out_features


class Stopwatch:
    """Seconds of calls, summed by label; on a GPU until the device has done them."""

    def __init__(self, device: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device

    def call(self, label: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result."""
        begin = self._now()
        result = function(*args, **kwargs)
        self.seconds[label] += self._now() - begin
        return result

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    add_model_flag(parser)
    parser.add_argument("--quantization", default="none", choices=("none", "int8"))
    parser.add_argument("--rows", type=whole_numbers, default=(1, 8, 32), help="sequences")
    parser.add_argument("--context", type=int, default=160, help="of each decoding sequence")
    parser.add_argument("--prefill", type=int, default=512, help="tokens, shared by the sequences")
    parser.add_argument("--adapters", type=whole_numbers, default=(8, 32))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; returns the record."""
    if options.quick:
        options.rows, options.adapters, options.rank, options.rounds = (1, 2), (2,), 8, 1
        options.context, options.prefill = 20, 8
    plans = cases(options)
    with tempfile.TemporaryDirectory() as directory:
        settings = engine_settings(
            options,
            Path(directory),
            quantization=options.quantization,
            max_adapters=max(options.adapters),
        )
        spec = engine_spec(settings)
        ranks = (options.rank,) * max(case.num_adapters for case in plans)
        images = store_adapters(spec, ranks, Path(directory))
        with closing(StepEngine(settings, images)) as engine:
            errors = check(engine, checked_cases(options))
            steps = [engine.hold(case) for case in plans]
            rows = measure(engine, steps, options.rounds)
    numbers: dict[str, Any] = {
        "model": spec.config.name,
        "dtype": spec.dtype,
        "settings": changed(settings),
        "num_threads": torch.get_num_threads(),
        "check": {"errors": errors, "at_most": MAX_ERROR},
        "rows": rows,
        "bars": bars(rows),
    }
    print(report(numbers))
    return finish("step_profile", spec.device, options, numbers)


def cases(options: argparse.Namespace) -> list[Case]:
    """The steps of every number of rows: base model, and each number of adapters that is used.

    Raises ValueError for a context without a token before the last, and for more rows than tokens.
    """
    if options.context < 2:
        raise ValueError(f"--context {options.context}: a decode has 2 tokens or more")
    if options.prefill < 2 * max(options.rows):
        raise ValueError(
            f"--prefill {options.prefill}: fewer than 2 tokens for each of {max(options.rows)} "
            "sequences; give more, or fewer --rows"
        )
    return [
        Case(phase, num_rows, num_adapters, context)
        for phase in ("decode", "prefill")
        for num_rows in options.rows
        for context in [options.context if phase == "decode" else options.prefill // num_rows]
        for num_adapters in sorted({0, *(min(n, num_rows) for n in options.adapters)})
    ]


def checked_cases(options: argparse.Namespace) -> list[Case]:
    """Small ones: the reference kernels loop over tokens and rank rows."""
    num_rows = min(4, max(options.rows))
    num_adapters = min(num_rows, max(options.adapters))
    return [
        Case("decode", num_rows, num_adapters, 10),
        Case("prefill", num_rows, num_adapters, 8),
    ]


def measure(engine: StepEngine, steps: Sequence[HeldStep], rounds: int) -> list[dict[str, Any]]:
    """A row for each step; the steps of a round follow one another, the first round warms up."""
    products = [gemms(engine, step) for step in steps]
    found: list[list[Round]] = [[] for _ in steps]
    for number in range(-1, rounds):
        for i in range(len(steps)):
            n = (i + number) % len(steps)
            once = one_round(engine, steps[n], products[n])
            if number >= 0:
                found[n].append(once)
    return [row(*all_of) for all_of in zip(steps, products, found, strict=True)]


def gemms(engine: StepEngine, step: HeldStep) -> list[Gemm]:
    """The products of a step in their order, each with the first input of its shape."""
    found: list[Gemm] = []
    inputs: dict[torch.Size, Tensor] = {}
    forward = Linear.forward

    def recorded(
        linear: Linear,
        x: Tensor,
        dtype: torch.dtype | None = None,
        reads: RowReads | None = None,
    ) -> Tensor:
        found.append(Gemm(linear, inputs.setdefault(x.shape, x), dtype))
        return forward(linear, x, dtype, reads)

    with patch.object(Linear, "forward", recorded):
        engine.runner.run(step.plan)
    return found


class Round(NamedTuple):
    """Seconds of one step in one round."""

    plain: float  # without timers
    timed: float
    operations: dict[str, float]
    alone: dict[str, float]  # each shape of a linear layer


def one_round(engine: StepEngine, step: HeldStep, products: Sequence[Gemm]) -> Round:
    """The step as it is, with timers, and its linear layers alone."""
    device = engine.spec.device
    whole, inside, alone = Stopwatch(device), Stopwatch(device), Stopwatch(device)
    whole.call("plain", engine.runner.run, step.plan)
    with timers(engine.kernels, inside):
        whole.call("timed", engine.runner.run, step.plan)
    with torch.inference_mode():
        for gemm in products:
            alone.call(gemm.label, gemm.linear.forward, gemm.x, gemm.dtype)
    return Round(whole.seconds["plain"], whole.seconds["timed"], inside.seconds, alone.seconds)


@contextmanager
def timers(kernels: Kernels, watch: Stopwatch) -> Iterator[None]:
    """Within it every operation of a step is timed: kernels, linear layers, batch and sampling."""
    forward = Linear.forward

    def linear(
        layer: Linear,
        x: Tensor,
        dtype: torch.dtype | None = None,
        reads: RowReads | None = None,
    ) -> Tensor:
        return watch.call(Gemm(layer, x, dtype).label, forward, layer, x, dtype, reads)

    def stand_in(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: watch.call(name, function, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, label in (
            (batch, "build", "batch"),
            *((kernels, name, name) for name in OPERATIONS),
            (runner, "sample", "sample"),
        ):
            replaced = stand_in(label, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, replaced))
        stack.enter_context(patch.object(Linear, "forward", linear))
        yield


def row(step: HeldStep, products: Sequence[Gemm], rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over rounds of one step: its operations, and its products in it and alone."""
    case, schedule = step.case, statistics.median(step.schedule_seconds or (0.0,))
    linears = {gemm.label for gemm in products}
    inside = [sum(r.operations[label] for label in linears) for r in rounds]
    alone = [sum(r.alone.values()) for r in rounds]
    wholes = [r.timed + schedule for r in rounds]
    operations = {SCHEDULE: schedule} if step.schedule_seconds else {}
    for label in rounds[0].operations:
        operations[label] = statistics.median([r.operations[label] for r in rounds])
    operations[REST] = statistics.median([r.timed - sum(r.operations.values()) for r in rounds])
    num_flops = sum(gemm.num_flops for gemm in products)
    whole = statistics.median(wholes)
    return {
        "phase": case.phase,
        "num_rows": case.num_rows,
        "num_adapters": case.num_adapters,
        "context": case.context,
        "num_tokens": case.num_tokens,
        "step_seconds": spread([r.plain + schedule for r in rounds]),
        "timed_step_seconds": spread(wholes),
        "operations": {
            label: {"seconds": seconds, "share": seconds / whole}
            for label, seconds in operations.items()
        },
        "alone_seconds": {
            label: statistics.median([r.alone[label] for r in rounds]) for label in sorted(linears)
        },
        "non_gemm_share": spread([1 - a / b for a, b in zip(inside, wholes, strict=True)]),
        "gemm_rate_of_alone": spread([a / b for a, b in zip(alone, inside, strict=True)]),
        "gemm_flops_per_second": num_flops / statistics.median(inside),
    }


if __name__ == "__main__":
    main()
