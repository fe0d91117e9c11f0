"""Holds every operation of a step against the reference kernel, on the step's own arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from torch import Tensor

from bench.held_steps import Case, StepEngine
from kernels import reference
from kernels.ops import Kernels

OPERATIONS = tuple(name for name in vars(Kernels) if not name.startswith("_"))

MAX_ERROR = 0.01
"""Root mean square of the difference that bf16 may make, as a share of what is expected."""


def check(engine: StepEngine, checked: Sequence[Case]) -> dict[str, float]:
    """Largest distance of each operation from the reference kernel on the same arguments.

    Of what it returns and what it changes in place, as MAX_ERROR has it; what it writes to pages
    is left out. Operation by operation, since a step of int8 layers makes much of a last bit.
    Raises RuntimeError above MAX_ERROR.
    """
    errors = dict.fromkeys(OPERATIONS, 0.0)

    def compared(name: str) -> Callable[..., Any]:
        ours, theirs = getattr(engine.kernels, name), getattr(reference, name)

        def both(*args: Any, **more: Any) -> Any:
            copies = [_copy(arg, engine.storage) for arg in args]
            found, expected = ours(*args, **more), theirs(*copies, **more)
            for pair in zip((found, *args), (expected, *copies), strict=True):
                errors[name] = max(errors[name], _held(name, _distance(*pair)))
            return found

        return both

    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(patch.object(engine.kernels, name, compared(name)))
        for case in checked:
            engine.runner.run(engine.hold(case).plan)
    return errors


def _held(name: str, error: float) -> float:
    if not error <= MAX_ERROR:
        raise RuntimeError(
            f"{name} is {error:.3f} of its size from the reference kernel: rounding makes "
            f"{MAX_ERROR} at most"
        )
    return error


def _copy(arg: Any, storage: Tensor) -> Any:
    """A tensor's own copy, unless it lies in the pages."""
    if not isinstance(arg, Tensor) or arg.untyped_storage().data_ptr() == storage.data_ptr():
        return arg
    return arg.clone()


def _distance(found: Any, expected: Any) -> float:
    """Root mean square of the difference, as a share of what is expected; 0 for no numbers."""
    if not isinstance(found, Tensor) or found is expected or not found.is_floating_point():
        return 0.0
    difference, size = found.double() - expected.double(), expected.double()
    return float(difference.norm() / size.norm().clamp(min=1e-30))
