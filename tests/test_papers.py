"""What the papers say of the code is so: trees, tables, links, commands, routes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [str(paper.relative_to(ROOT)) for paper in PAPERS]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name):
    return CODE.sub("", read(name))


def anchors(name):
    headings = re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def flags_of(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_every_paper_is_there():
    papers = {
        "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md",
        "docs/api.md", "docs/adapters.md", "docs/operations.md", "docs/kernels.md",
    }  # fmt: skip
    assert papers <= set(NAMES)
    assert read("LICENSE").lstrip().startswith("Apache License")


def test_generated_parts_are_up_to_date():
    run = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, f"run `make docs`: {run.stdout}{run.stderr}"


def test_a_stale_part_is_noticed(tmp_path):
    """The check fails where a module's line is missing, and `make docs` mends it."""
    for name in ("README.md", "docs/operations.md", "docs/generate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(read(name), encoding="utf-8")
    for package in ("server", "adapters_store", "kernels"):
        (tmp_path / package).symlink_to(ROOT / package)
    readme = tmp_path / "README.md"
    whole = readme.read_text(encoding="utf-8")
    readme.write_text(re.sub(r"^ +reference\.py .*\n", "", whole, flags=re.MULTILINE))

    def run(*arguments):
        script = [sys.executable, str(tmp_path / "docs/generate.py"), *arguments]
        return subprocess.run(script, capture_output=True, text=True, check=False)

    stale = run("--check")
    assert (stale.returncode, stale.stdout) == (1, "out of date: README.md (tree)\n")
    assert run().returncode == 0
    assert readme.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in LINK.findall(prose(name)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(found.resolve().relative_to(ROOT)), f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_prose_exist(name):
    for word in re.findall(r"`([\w./-]+\.py)`", prose(name)):
        found = [ROOT / word, ROOT / "server" / word, *ROOT.glob(f"*/**/{word}")]
        assert any(path.is_file() for path in found), f"{name} speaks of {word}"


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_named_in_the_papers_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    told = set(re.findall(r"`make ([a-z][a-z-]*)|^make ([a-z][a-z-]*)", read(name), re.MULTILINE))
    named = {first or second for first, second in told}
    assert named <= targets, f"{name}: no such target: {named - targets}"


def test_flags_named_in_the_papers_are_settings():
    from server.config import Settings

    known = {f"--{field.replace('_', '-')}" for field in Settings.model_fields} | {"--help"}
    known |= {"--no-shipped-adapters", "--no-cuda-graphs", "--no-prefix-cache"}
    of_others = {"--target", "--build-arg", "--gpus", "--index-url", "--no-deps"}
    for name in ("README.md", "ARCHITECTURE.md", "docs/operations.md", "docs/api.md"):
        assert flags_of(read(name)) <= known | of_others, name


def test_bodies_of_the_readmes_requests_are_json_that_the_api_takes():
    from server.api.wire import ChatBody

    bodies = re.findall(r"-d '(\{.*?\})'", read("README.md"), re.DOTALL)
    assert len(bodies) == 2
    for body in bodies:
        ChatBody.model_validate(json.loads(body))


def test_adapters_named_in_the_readme_are_shipped():
    from adapters_store.shipped import shipped_adapters

    named = set(re.findall(r'"adapter_id": "(\w+)"', read("README.md"))) - {"mine"}
    assert named
    assert named <= shipped_adapters().keys()


def test_every_metric_is_told():
    from server.metrics import Metrics

    families = [family.name for family in Metrics(lambda: None).registry.collect()]
    told = read("docs/api.md")
    assert not [name for name in families if f"`{name}" not in told]


def test_metrics_named_in_operations_exist():
    told = set(re.findall(r"manylora_[a-z_]+", read("docs/operations.md")))
    known = set(re.findall(r"manylora_[a-z_]+", read("docs/api.md")))
    assert told <= known, told - known


def test_the_changelog_has_the_version_or_unreleased_changes():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    text = read("CHANGELOG.md")
    assert "## [Unreleased]" in text or f"## [{version}]" in text
    kinds = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
