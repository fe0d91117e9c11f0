"""Imports point down only, and the names and sizes of files keep to the style."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "adapters_store", "kernels")
MAX_LINES = 500

# What a part may import of ours beside itself. A part is the longest prefix of a module's name
# that stands here.
LAYERS: dict[str, set[str]] = {
    "kernels": set(),
    "adapters_store": {"kernels"},
    "server.config": set(),
    "server.errors": set(),
    "server.memory": {"adapters_store", "kernels"},
    "server.model": {"server.config", "adapters_store", "kernels"},
    "server.engine": {
        "server.config", "server.memory", "server.model", "adapters_store", "kernels",
    },
    "server.metrics": {"server.engine"},
    "server.text": {"server.errors"},
    "server.api": {
        "server.config", "server.errors", "server.metrics", "server.text", "server.engine",
        "adapters_store",
    },
    "server.registration": {"server.config", "server.errors", "adapters_store"},
    "server.frontend": {
        "server.config", "server.errors", "server.registration", "server.api", "server.text",
        "server.engine", "server.model", "adapters_store",
    },
    "server.serve": {
        "server.config", "server.errors", "server.registration", "server.frontend",
        "server.engine", "server.model", "adapters_store",
    },
    "server.roofline": {
        "server.config", "server.memory", "server.model", "adapters_store", "kernels",
    },
    "server.cli": {"server.config", "server.serve", "server.roofline"},
}  # fmt: skip

# The API speaks to the engine in messages: of the engine it knows only these.
API_SEES_OF_ENGINE = {"server.engine.request"}

# Scripts that train and measure the shipped adapters; nothing that serves imports them.
TRAINING = {"adapters_store.shipped.train", "adapters_store.shipped.measure"}

# Libraries, and the only parts that may import them.
CONFINED: dict[str, set[str]] = {
    "torch": {"kernels", "server.memory", "server.model", "server.engine"},
    "triton": {"kernels.triton"},
    "numba": {"kernels.cpu"},
    "llvmlite": {"kernels.cpu"},
    "transformers": {"server.model"},
    "gguf": {"server.model.gguf_blocks"},
    "peft": set(),
    "fastapi": {"server.api", "server.frontend"},
    "starlette": {"server.api"},
    "uvicorn": {"server.frontend"},
    "asyncio": {"server.api", "server.serve", "server.frontend", "server.engine.client"},
    "zmq": {"server.engine.client", "server.engine.mailbox"},
    "sqlite3": {"adapters_store.catalogue"},
    "prometheus_client": {"server.metrics", "server.api.operations"},
}

# Plain Python over integers, names and files: no tensors.
WITHOUT_TENSORS = (
    "server.engine.scheduler", "server.engine.plan", "server.engine.sequence",
    "server.engine.waiting", "server.engine.drains", "server.engine.request",
    "server.engine.loop", "server.engine.fairness", "server.engine.fronts",
    "server.engine.endings", "server.engine.overload", "server.engine.load_ahead",
    "server.memory.kv_cache", "server.memory.prefix_index", "server.memory.idle_heap",
    "server.memory.residency", "server.memory.byte_rate",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {module_name(path): path for path in paths}


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(name: str, *, types: bool = True, functions: bool = True) -> set[str]:
    """Dotted names that a module imports; for `from a import b` it is a.b where that is ours."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_type_checking(node) and not types:
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import: write the whole name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner & modules().keys() or {str(node.module)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(name))
    return found


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def part_of(name: str) -> str | None:
    return max((part for part in LAYERS if is_within(name, part)), key=len, default=None)


def is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def test_every_module_belongs_to_a_layer():
    homeless = [name for name in modules() if part_of(name) is None]
    assert homeless == ["server"], f"give these a row in LAYERS: {homeless}"


def test_the_layers_have_an_order():
    order: list[str] = []
    while len(order) < len(LAYERS):
        ready = [part for part in LAYERS if part not in order and LAYERS[part] <= set(order)]
        assert ready, f"LAYERS has a circle among {LAYERS.keys() - set(order)}"
        order += ready


def test_imports_point_down_only():
    upward = [
        f"{name} imports {imported}"
        for name in modules()
        for imported in imports_of(name)
        if is_ours(imported)
        and part_of(imported) != part_of(name)
        and part_of(imported) not in LAYERS.get(part_of(name) or "", set())
    ]
    assert not upward, f"not below in LAYERS: {upward}"


def test_the_api_knows_the_engine_by_its_messages_only():
    seen = {
        f"{name} imports {imported}"
        for name in modules()
        for imported in imports_of(name)
        if part_of(name) in ("server.api", "server.metrics")
        and is_within(imported, "server.engine")
        and imported not in API_SEES_OF_ENGINE
    }
    assert not seen, f"send a message of server.engine.request instead: {seen}"


def test_no_module_imports_itself_through_others():
    graph = {
        name: {i for i in imports_of(name, types=False, functions=False) if i in modules()}
        for name in modules()
    }
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' → '.join([*path, name])}"
        if name not in done:
            for imported in graph[name]:
                walk(imported, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("library", CONFINED)
def test_a_library_stays_where_it_is_needed(library):
    outside = [
        name
        for name in modules()
        if name not in TRAINING
        and any(is_within(imported, library) for imported in imports_of(name, types=False))
        and not any(is_within(name, part) for part in CONFINED[library])
    ]
    assert not outside, f"{library} belongs to {CONFINED[library]}, not to {outside}"


@pytest.mark.parametrize("name", WITHOUT_TENSORS)
def test_what_decides_knows_no_tensors(name):
    assert name in modules(), f"{name} is gone: bring WITHOUT_TENSORS up to date"
    assert not {i for i in imports_of(name, types=False) if i.split(".")[0] in ("torch", "numpy")}


def test_nothing_imports_the_training_scripts():
    users = [name for name in modules() if name not in TRAINING and imports_of(name) & TRAINING]
    assert not users, f"{users} import a training script, which needs PEFT and torch"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("adapters_store.store", {"torch", "fastapi", "server"}),
        ("adapters_store.admission", {"torch", "fastapi", "server"}),
        ("server.engine.scheduler", {"torch", "fastapi", "asyncio", "transformers"}),
        ("kernels.ops", {"torch", "triton", "numba"}),
        ("server.cli", {"torch", "numba", "fastapi"}),
        ("server.serve", {"torch", "numba", "numpy", "fastapi", "transformers"}),
        ("server.frontend", {"torch", "numba"}),
        ("server.engine.process", {"transformers", "gguf", "fastapi", "numba", "triton"}),
        ("server.roofline.command", {"torch", "numba", "fastapi", "transformers"}),
    ],
)
def test_importing_a_module_leaves_heavy_libraries_alone(module, absent):
    script = f"import {module}, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & absent, f"import {module} loads {loaded & absent}"


def test_the_environment_is_read_in_one_place():
    """Settings come from server.config; the CLI and admission set variables for processes and
    libraries, and numba's threads and cache directory are chosen before any settings are known.
    """
    allowed = {"server.cli", "adapters_store.admission", "kernels.cpu", "kernels.cpu.runtime"}
    readers = {
        name
        for name in modules()
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers <= allowed, f"{readers - allowed}: make it a setting"


def test_every_module_says_what_it_is():
    silent = [name for name in modules() if not ast.get_docstring(parsed(name))]
    assert not silent, f"a module docstring is missing: {silent}"


def test_no_module_is_named_after_nothing():
    nameless = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    code = [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in code if path.stem in nameless]
    found += [name for name in modules() if name.split(".")[-1] in nameless]
    assert not found, f"name the concept instead: {found}"


def test_no_file_is_too_long_to_read():
    folders = (*PACKAGES, "tests", "bench", "docs")
    long = {
        str(path.relative_to(ROOT)): num_lines
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_the_tests_are_no_packages():
    found = [str(path) for path in (ROOT / "tests").rglob("__init__.py")]
    assert not found, f"pytest imports tests by file, an __init__.py breaks that: {found}"


def test_kernels_holds_a_docstring_and_nothing_else():
    assert len(parsed("kernels").body) == 1
    assert ast.get_docstring(parsed("kernels"))


def test_our_kernels_are_not_taken_for_hugging_faces():
    """transformers takes an importable `kernels` for its own if its distribution is a 0.18."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "manylora"
    assert not project["version"].startswith("0.18")
    assert not [need for need in project["dependencies"] if need.startswith("kernels")]
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def project_files() -> list[Path]:
    """Files of the repository, ignored ones left out."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.split("\0") if name]
    folders = (*PACKAGES, "tests", "bench", "docs")
    return [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]


def test_no_file_speaks_of_the_place_where_it_was_made():
    words = ["/" + "work/", "/" + "tmp/w", "/" + "opt/py" + "pi", "localhost:" + "3141"]
    told: dict[str, list[str]] = defaultdict(list)
    for path in project_files():
        if path.is_file() and path.suffix not in (".safetensors", ".gguf", ".png"):
            text = path.read_text(encoding="utf-8", errors="replace")
            told[str(path)] += [word for word in words if word in text]
    found = {path: words for path, words in told.items() if words}
    assert not found, f"a path of one machine: {found}"
