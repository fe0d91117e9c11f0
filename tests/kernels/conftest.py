"""The case builders of `cases.py` as fixtures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _load_cases() -> ModuleType:
    # Tests are no package (importlib mode), so a file beside them is loaded by its path.
    spec = importlib.util.spec_from_file_location(
        "kernel_cases", Path(__file__).with_name("cases.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CASES = _load_cases()


@pytest.fixture(scope="session")
def make_adapter_case() -> Callable[..., Any]:
    """`cases.make_adapter_case`: keyword arguments to the arguments of `add_adapters`."""
    return CASES.make_adapter_case


@pytest.fixture(scope="session")
def make_attention_case() -> Callable[..., Any]:
    """`cases.make_attention_case`: a step's arguments for attention and rotary + KV write."""
    return CASES.make_attention_case
