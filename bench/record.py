"""What every bench script shares: its common flags, medians, and the JSON line that it ends in."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.tiny_model import write_tiny_model
from server.config import EMBEDDED_MODEL, Settings

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("manylora", "torch", "triton", "numba", "numpy", "transformers")


def arguments(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags of every script; its help is the script's docstring."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", help="as of `manylora serve`")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    parser.add_argument(
        "--quick", action="store_true", help="smallest sizes: shows that it runs, measures nothing"
    )
    return parser


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """--model of the scripts that serve one."""
    parser.add_argument("--model", help="directory, hub id or .gguf; the embedded one if not given")


def engine_settings(options: argparse.Namespace, directory: Path, **settings: Any) -> Settings:
    """The settings of the server under test; its data goes under `directory`.

    Others are settings' own, MANYLORA_… variables among them. With --quick and no --model the base
    is a tiny random one.
    """
    model = options.model or EMBEDDED_MODEL
    if options.quick and options.model is None:
        model = str(write_tiny_model(directory / "tiny-model"))
    return Settings.model_validate(
        {
            "model": model,
            "device": options.device,
            "dtype": options.dtype,
            "data_dir": directory / "data",
            "shipped_adapters": False,
            **settings,
        }
    )


def torch_device(wanted: str) -> str:
    """ "cpu" or "cuda" for --device; exits with 2 where a GPU is asked for and there is none."""
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        sys.stderr.write("--device cuda: torch finds no CUDA device here; use --device cpu\n")
        sys.exit(2)
    return ("cuda" if has_gpu else "cpu") if wanted == "auto" else wanted


def numbers(text: str) -> tuple[float, ...]:
    """argparse's type of a list such as 0.5,0.8,1."""
    found = tuple(float(word) for word in text.split(","))
    if min(found) <= 0:
        raise argparse.ArgumentTypeError(f"{min(found)} in {text!r} is not above 0")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """argparse's type of a list such as 1,8,32."""
    found = tuple(int(word) for word in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{min(found)} in {text!r} is below 1")
    return found


def percentiles(values: Sequence[float], *ranks: float) -> dict[str, float]:
    """The percentiles as p50, p99, …; NaN of no values."""
    found = np.percentile(values, ranks) if len(values) else np.full(len(ranks), np.nan)
    return {f"p{rank:g}": float(x) for rank, x in zip(ranks, found, strict=True)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90 of the same figure in several rounds."""
    found = percentiles(values, 50, 10, 90)
    return {"median": found["p50"], "p10": found["p10"], "p90": found["p90"]}


def changed(settings: Settings) -> dict[str, Any]:
    """The settings that are not left at their defaults, for a record."""
    return settings.model_dump(mode="json", exclude_defaults=True, exclude={"data_dir"})


def peak_bytes(pid: int) -> int | None:
    """Most memory that a process ever had resident; None where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def machine(device: str) -> dict[str, Any]:
    """Commit, versions, device and how busy the machine is; device is "cpu" or "cuda"."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _accelerator() if device == "cuda" else _processor(),
        "device_type": device,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def finish(
    name: str, device: str, options: argparse.Namespace, results: dict[str, Any]
) -> dict[str, Any]:
    """Print the record as one JSON line, write it to --output, and return it.

    Numbers keep five digits, and NaN becomes null. The file is written whole or not at all.
    """
    parameters = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    del parameters["output"]
    record = {
        "bench": name,
        **machine(device),
        "command": _command(sys.orig_argv),
        "parameters": parameters,
        **_rounded(results),
    }
    line = json.dumps(record, allow_nan=False)
    if options.output is not None:
        _write(options.output, line + "\n")
    print(line)
    return record


def commit() -> str | None:
    """The commit, with a + where files differ from it; None outside of a repository."""
    answers = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
    ]
    if any(answer.returncode for answer in answers):
        return None
    head, changes = (answer.stdout.strip() for answer in answers)
    return f"{head}+" if changes else head


def _command(words: Sequence[str]) -> list[str]:
    """The command line, without where its output goes and where this Python is."""
    given = iter(words[1:])
    kept = ["python"]
    for word in given:
        if word == "--output":
            next(given, None)
        elif not word.startswith("--output="):
            kept.append(word)
    return kept


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).chmod(0o644)
    Path(unfinished.name).replace(path)
