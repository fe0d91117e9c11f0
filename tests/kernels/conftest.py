"""The case builders of `cases.py` as fixtures."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`kernels.triton.ops` in Triton's interpreter, on CPU tensors, as a copy of its own.

    Triton decides at import whether a function is interpreted, and other code may have imported
    it before. So the package is imported anew, Triton's own library functions are wrapped for
    the time of the test, and whatever the interpreter patched is put back afterwards.
    Uninitialised memory is NaN meanwhile, so that no result or scratch is read before its write.
    """
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _repair_bfloat16(monkeypatch)
    places = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.condition)
    snapshots = [(place, dict(vars(place))) for place in (*places, tl.core.tensor_descriptor_base)]
    for module in (tl, tl.standard, tl.math):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
    for name in [name for name in sys.modules if name.startswith("kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield importlib.import_module("kernels.triton.ops")
    torch.use_deterministic_algorithms(False)
    for name in [name for name in sys.modules if name.startswith("kernels.triton")]:
        del sys.modules[name]
    for place, before in snapshots:
        for name, value in before.items():
            if vars(place).get(name) is not value:
                setattr(place, name, value)


def _repair_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter treat bfloat16 as the GPU does.

    It holds bf16 as uint16: `dot` multiplies those integers, and a cast to bf16 cuts the bits
    off where a GPU rounds to the nearest.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        data = rounded.view(torch.int16).numpy().view(np.uint16).reshape(source.data.shape)
        return TensorHandle(data, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
