"""A model and a machine small enough to compute by hand."""

from __future__ import annotations

import pytest

from server.roofline.hardware import Hardware
from server.roofline.shapes import ModelShape


@pytest.fixture
def tiny() -> ModelShape:
    """Two layers, hidden 32, MLP 48, 4 heads and 2 KV heads of 8; q 32, k and v 16 each."""
    return ModelShape("tiny", 2, 32, 48, 4, 2, 8, 64, 128)


@pytest.fixture
def machine() -> Hardware:
    """10^6 bytes, 10^9 bytes and 10^12 operations a second, no cache."""
    return Hardware("machine", 10**6, 1e9, 1e12, 0)
