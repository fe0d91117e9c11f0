"""bench/tune_gpu.py goes through everything without a GPU, and says so when it needs one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.triton import tuned
from kernels.triton.tiles import Work

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench.tune_gpu", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_dry_run_writes_a_table_that_the_choice_of_tiles_reads(tmp_path):
    done = run("--dry-run", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    path = tuned.table_path("dry run", tmp_path)
    assert (told["file"], told["works"]) == (str(path), 2)
    points = tuned.tuned_points(path)
    for num_tokens, max_segment in ((2, 1), (17, 17)):
        work = Work(num_tokens, 1, max_segment, 6, 24, (0, 16, 24), 2)
        assert points[tuned.shape_of(work)].keys() == {(num_tokens, 6)}


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run()
    assert done.returncode == 2
    assert "finds none here" in done.stderr
    assert done.stdout == ""
