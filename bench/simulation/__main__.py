"""How does the server behave on a GPU that is not there? A simulation, which measures nothing.

The server's own loop, scheduler, page pool and adapter residency run in virtual time; a step takes
what its bytes and operations take at assumed shares of a GPU's peak rates. Writes simulation.json,
simulation.md and plots. docs/simulation.md tells the model and its limits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.plots import RESULTS
from bench.record import finish
from bench.simulation import fairness, memory_split, popularity, slora_table, slot_cliff
from bench.simulation.experiment import Experiment
from bench.simulation.machine import MACHINES, SIMULATED
from bench.simulation.plots import draw
from bench.simulation.tables import markdown, verdict

EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "slora": slora_table.run,
    "slot_cliff": slot_cliff.run,
    "memory": memory_split.run,
    "popularity": popularity.run,
    "fairness": fairness.run,
}
QUICK_REQUESTS = 24


def main() -> None:
    """Run the experiments, write what they found, and print the bars."""
    options = _parser().parse_args()
    if unknown := set(options.experiments) - EXPERIMENTS.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: the experiments are {', '.join(EXPERIMENTS)}")
    seeds = list(range(1 if options.quick else options.seeds))
    sizes = {"num_requests": QUICK_REQUESTS} if options.quick else {}
    found = {}
    for name in options.experiments or EXPERIMENTS:
        found[name] = EXPERIMENTS[name](seeds, **sizes).to_json()
        for bar in found[name]["bars"]:
            print(f"{name}: {verdict(bar)}", file=sys.stderr, flush=True)
    directory = options.output
    options.output = directory / "simulation.json"
    machines = [machine.described() for machine in MACHINES.values()]
    results = {"nature": SIMULATED, "machines": machines, "seeds": seeds, "experiments": found}
    record = finish("simulation", "cpu", options, results)
    (directory / "simulation.md").write_text(markdown(record), encoding="utf-8")
    for path in draw(record["experiments"], directory):
        print(path, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("experiments", nargs="*", help=f"some of {', '.join(EXPERIMENTS)}; default all")
    add("--seeds", type=int, default=3, help="runs of each row (%(default)s)")
    add(
        "--output",
        type=Path,
        metavar="DIRECTORY",
        default=RESULTS,
        help="for JSON, Markdown and PNG files",
    )
    add("--quick", action="store_true", help="few requests, one seed: shows that it runs")
    return parser


if __name__ == "__main__":
    main()
