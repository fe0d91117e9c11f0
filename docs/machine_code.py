"""Rewrites the table of machine code in docs/kernels.md: `make machine-code`. No GPU is needed.

Every kernel is compiled as it is launched for the served models, and taken apart; a few minutes.
A row gives the range over the spans that share a tile, since their shapes differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from generate import ROOT, rewritten

PAPER = ROOT / "docs" / "kernels.md"
MODELS = ("llama-3-8b", "qwen2.5-7b", "smollm2-135m")
TARGETS = ("sm_80", "sm_90")
COLUMNS = (
    "model", "kernel", "tile", "target", "registers", "shared bytes", "spilled bytes",
    "resident warps of 64", "loads of 128 / 64 / 32 / 16 bits", "tensor-core instructions",
)  # fmt: skip

Facts = dict[str, Any]


def compiled_facts() -> list[Facts]:
    """What `compile_kernels.py` finds for every model and target of the table."""
    script = ROOT / "tests" / "kernels" / "compile_kernels.py"
    spans = "qkv+o+gate_up+down+step"
    jobs = [f"{model}/{target}/{spans}" for target in TARGETS for model in MODELS]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *jobs], env=environment, stdout=subprocess.PIPE, check=True
    )
    facts: list[Facts] = json.loads(done.stdout)
    return facts


def section(facts: list[Facts]) -> str:
    """The table, and the compiler that it holds for."""
    rows: dict[tuple[str, ...], list[Facts]] = defaultdict(list)
    for fact in facts:
        key = (fact["model"], fact["kernel"].strip("_"), fact["tile"], fact["target"])
        rows[key].append(fact)
    ordered = sorted(rows.items(), key=lambda row: (MODELS.index(row[0][0]), row[0][1:]))
    lines = [f"Compiled by Triton {version('triton')}.", ""]
    lines.append(f"| {' | '.join(COLUMNS)} |")
    lines.append("|" + "---|" * len(COLUMNS))
    lines += [f"| {' | '.join([*key, *_cells(found)])} |" for key, found in ordered]
    return "\n".join(lines)


def _cells(facts: list[Facts]) -> list[str]:
    names = sorted({name for fact in facts for name in fact["matrix_instructions"]})
    spilled = [f["spilled_bytes"] + f["spill_instructions"] for f in facts]
    return [
        _range(fact["registers"] for fact in facts),
        _range(fact["shared_bytes"] for fact in facts),
        _range(spilled),
        _range(fact["resident_warps"] for fact in facts),
        " / ".join(_range(f["loads"].get(bits, 0) for f in facts) for bits in _WIDTHS),
        ", ".join(
            f"{_range(f['matrix_instructions'].get(name, 0) for f in facts)} {name}"
            for name in names
        ),
    ]


_WIDTHS = ("128", "64", "32", "16")


def _range(values: Any) -> str:
    low, *_, high = sorted([*values] * 2)
    return str(low) if low == high else f"{low}-{high}"


def main(paper: Path = PAPER) -> None:
    """Compile, and rewrite the section."""
    old = paper.read_text(encoding="utf-8")
    paper.write_text(rewritten(old, "machine-code", section(compiled_facts())), encoding="utf-8")


if __name__ == "__main__":
    main()
