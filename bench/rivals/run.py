"""How fast are others with the same model, adapters and requests on this machine, beside manylora?

A closed loop of greedy completions of random prompts, end of sequence ignored. One rival's process
is alive at a time; rounds go over all rivals in turn, so that a change of the machine hits them
all. Nothing is timed that has not given the expected answers. Needs `bench.rivals.setup`.
Ends in tables and one JSON line; --output keeps the JSON, and the tables beside it as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.record import finish, spread, whole_numbers
from bench.rivals.environments import ROOT, RivalError
from bench.rivals.llamacpp import LlamaCpp
from bench.rivals.manylora import MANYLORA
from bench.rivals.model_files import NUM_ADAPTERS
from bench.rivals.rival import Launch, Rival
from bench.rivals.scripts import CONTINUOUS_BATCHING, PEFT_MIXED_BATCH
from bench.rivals.table import markdown
from bench.rivals.vllm import Vllm
from bench.rivals.workload import Case, Workload, figures

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (Vllm(), LlamaCpp(), PEFT_MIXED_BATCH, CONTINUOUS_BATCHING, *MANYLORA)
}
Row = tuple[str, str, int, int]
"""Rival, variant, adapters, requests in flight."""


@dataclass
class Measured:
    """The figures of every round by row, and what failed."""

    rows: defaultdict[Row, list[dict[str, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Measure, print and write; the status is 1 where a rival failed."""
    options = parse(sys.argv[1:])
    rivals = [RIVALS[name] for name in options.rivals]
    problems = [f"{rival.name}: {why}" for rival in rivals if (why := rival.problem())]
    if problems:
        sys.exit(f"bench.rivals.run: not set up: {'; '.join(problems)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives the run
    cases = cases_of(options.concurrency, options.adapters)
    workload = Workload(options.prompt, options.tokens, options.waves)
    measured = Measured()
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for rival in rivals:
            for launch in rival.launches(cases):
                measure(rival, launch, workload, measured)
    numbers = record(rivals, cases, measured)
    text = markdown(numbers)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(text)
    finish("rivals.run", "cpu", options, numbers)
    sys.exit(bool(measured.failures))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rivals", type=names, default=",".join(RIVALS))
    parser.add_argument("--concurrency", type=whole_numbers, default="1,8,32")
    parser.add_argument("--adapters", type=whole_numbers, default="8,32", help="beside the base")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--waves", type=int, default=1, help="requests, in multiples of those in flight"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="the JSON line; the tables go beside it as .md")
    return parser.parse_args(arguments)


def names(text: str) -> tuple[str, ...]:
    """argparse's type of a list of rivals."""
    found = tuple(text.split(","))
    unknown = [name for name in found if name not in RIVALS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} are none of {', '.join(RIVALS)}")
    return found


def cases_of(concurrency: Sequence[int], adapters: Sequence[int]) -> list[Case]:
    """Base and adapters at each concurrency; more adapters than requests in flight are left out."""
    return [
        Case(number, count)
        for number, count in itertools.product(concurrency, (0, *adapters))
        if count <= min(number, NUM_ADAPTERS)
    ]


def measure(rival: Rival, launch: Launch, workload: Workload, measured: Measured) -> None:
    """Add one launch's figures; a failure is told and recorded, and the others go on."""
    try:
        for case, traces in rival.measure(launch, workload):
            row = (rival.name, launch.variant, case.num_adapters, case.concurrency)
            found = figures(traces, workload)
            measured.rows[row].append(found)
            rate = found["output_tokens_per_second"]
            print(f"  {row}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    except (RivalError, ValueError) as error:
        message = f"{rival.name} {launch.variant}: {error}".replace(f"{ROOT}/", "")
        print(f"  FAILED {message}", file=sys.stderr, flush=True)
        measured.failures.append(message)


def record(rivals: list[Rival], cases: list[Case], measured: Measured) -> dict[str, Any]:
    """What was run, with the repository's own path left out of commands, and what came of it."""

    def shown(launch: Launch) -> dict[str, Any]:
        def local(word: str) -> str:
            return word.replace(f"{ROOT}/", "")

        return {
            "variant": launch.variant,
            "command": [local(word) for word in launch.command],
            "environment": {key: local(word) for key, word in launch.environment.items()},
        }

    return {
        "rivals": {
            rival.name: {
                "title": rival.title,
                "settings": rival.settings,
                "versions": rival.versions(),
                "launches": [shown(launch) for launch in rival.launches(cases)],
            }
            for rival in rivals
        },
        "rows": [
            dict(zip(("rival", "variant", "adapters", "concurrency"), row, strict=True))
            | {key: spread([found[key] for found in rounds]) for key in rounds[0]}
            for row, rounds in measured.rows.items()
        ],
        "failures": measured.failures,
    }


if __name__ == "__main__":
    main()
