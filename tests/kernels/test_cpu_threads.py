"""The CPU kernels keep to the threads that the operator gives them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import torch
from kernels.cpu import ops
for _ in range(3):
    ops.rms_norm(torch.randn(64, 576), torch.ones(576), 1e-5)
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_one_thread_is_one_thread_with_numba_too():
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["1", "1"]
