"""The whole suite in one command: runs the scripts one after the other, then draws the plots.

Writes NAME.json of each script and the plots into one directory: bench/results on a CPU,
bench/results/cuda on a GPU. A script that fails does not keep the others from running; the exit
status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.plots import RESULTS, draw_all
from bench.record import ROOT, torch_device

KERNEL_SCRIPTS = ("kernel_alternatives",)
SERVER_SCRIPTS = (  # these take --model
    "start",
    "step_profile",
    "closed_loop",
    "http_load",
    "many_adapters",
)
SCRIPTS = (*KERNEL_SCRIPTS, *SERVER_SCRIPTS)


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", help=f"some of {', '.join(SCRIPTS)}; default all")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--model", help="of the scripts that serve one")
    parser.add_argument("--quick", action="store_true", help="show that everything runs")
    parser.add_argument("--directory", type=Path, help="for JSON and PNG files")
    options = parser.parse_args()
    if unknown := set(options.scripts) - set(SCRIPTS):
        parser.error(f"{', '.join(sorted(unknown))}: the scripts are {', '.join(SCRIPTS)}")
    device = torch_device(options.device)
    directory = options.directory or (RESULTS / "cuda" if device == "cuda" else RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    failed = [
        name
        for name in options.scripts or SCRIPTS
        if subprocess.run(
            command(name, device, directory, options), cwd=ROOT, check=False
        ).returncode
    ]
    for path in draw_all(directory):
        print(path)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
        sys.exit(1)


def command(name: str, device: str, directory: Path, options: argparse.Namespace) -> Sequence[str]:
    """The command line of one script."""
    output = directory.resolve() / f"{name}.json"
    words = [sys.executable, "-m", f"bench.{name}", "--device", device, "--output", str(output)]
    if options.quick:
        words.append("--quick")
    if options.model and name in SERVER_SCRIPTS:
        words += ["--model", options.model]
    return words


if __name__ == "__main__":
    main()
