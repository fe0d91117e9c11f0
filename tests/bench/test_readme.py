"""bench/README.md tells of every script, and names no other."""

from __future__ import annotations

import re
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
README = (BENCH / "README.md").read_text(encoding="utf-8")


def test_every_script_is_told():
    scripts = [path.stem for path in BENCH.glob("*.py") if "\nif __name__" in path.read_text()]
    assert scripts
    assert not [name for name in scripts if name not in README]


def test_modules_that_are_named_exist():
    named = set(re.findall(r"python -m (bench[.\w]+)", README))
    named |= {f"bench.{name}" for name in re.findall(r"`(\w+)\.py`", README)}
    paths = {name: BENCH.parent / name.replace(".", "/") for name in named}
    missing = [
        name
        for name, path in paths.items()
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())
    ]
    assert not missing
