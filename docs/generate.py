"""Rewrites the parts of the papers that follow from the code: `make docs`, or --check.

The README's tree comes from module docstrings, the settings table of docs/operations.md from the
fields of `server.config.Settings`. A part stands between `<!-- NAME: … -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "adapters_store", "kernels")


def tree(root: Path = ROOT) -> str:
    """The Python files of the packages, each with the first line of its docstring."""
    entries = [entry for package in PACKAGES for entry in _entries(root / package, 0)]
    width = max(len(name) for name, _ in entries) + 2
    lines = [f"{name:<{width}}{text}".rstrip() for name, text in entries]
    return "\n".join(["```", *lines, "```"])


def settings_table() -> str:
    """Every setting: flag, variable, values, default, meaning."""
    sys.path.insert(0, str(ROOT))  # this checkout's settings, whichever one is installed
    from server.config import Settings

    prefix = str(Settings.model_config.get("env_prefix", ""))
    rows = ["| flag | variable | values | default | meaning |", "|---|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = _flag(name, field)
        variable = f"`{prefix}{name.upper()}`"
        meaning = (field.description or "").replace("|", "\\|")
        cells = [flag, variable, _values(field), _default(field), meaning]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "tree": ("README.md", tree),
    "settings": ("docs/operations.md", settings_table),
}


def rewritten(text: str, name: str, content: str) -> str:
    """`text` with the section's content replaced; ValueError unless it has both markers once."""
    pattern = re.compile(rf"(<!-- {name}:[^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    found = pattern.findall(text)
    if len(found) != 1:
        raise ValueError(
            f"section {name!r} begins {len(found)} times: put one '<!-- {name}: … -->' line and "
            f"one '<!-- /{name} -->' line into the paper"
        )
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def main() -> None:
    """Rewrite the sections; with --check, exit with 1 when one is out of date."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    is_check = parser.parse_args().check
    stale: list[str] = []
    for name, (paper, make) in SECTIONS.items():
        path = ROOT / paper
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, name, make())
        if new != old:
            stale.append(f"{paper} ({name})")
            if not is_check:
                path.write_text(new, encoding="utf-8")
    if stale:
        sys.stdout.write(f"{'out of date' if is_check else 'rewritten'}: {', '.join(stale)}\n")
    if stale and is_check:
        sys.exit(1)


def _entries(folder: Path, depth: int) -> list[tuple[str, str]]:
    """(indented name, first docstring line) of a package, its modules, then its subpackages."""
    inner = "  " * (depth + 1)
    entries = [("  " * depth + f"{folder.name}/", _first_line(folder / "__init__.py"))]
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    entries += [(inner + path.name, _first_line(path)) for path in modules]
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        entries += _entries(package, depth + 1)
    return entries


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").split("\n", 1)[0]


def _flag(name: str, field: FieldInfo) -> str:
    words = name.replace("_", "-")
    return f"`--{words}`, `--no-{words}`" if field.annotation is bool else f"`--{words}`"


def _values(field: FieldInfo) -> str:
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    if kinds and get_origin(annotation) not in (list, dict):
        annotation = kinds[0]
    names = {
        bool: "true, false", int: "integer", float: "number", str: "text", Path: "path",
        list[str]: "texts", dict: "NAME=NUMBER",
    }  # fmt: skip
    annotation = get_origin(annotation) if get_origin(annotation) is dict else annotation
    return " ".join([names[annotation], *_bounds(field)])


def _bounds(field: FieldInfo) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [
        f"{sign} {getattr(bound, key)}"
        for bound in field.metadata
        for key, sign in signs.items()
        if getattr(bound, key, None) is not None
    ]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ([], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    main()
