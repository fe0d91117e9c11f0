"""The identity of an adapter: sha256 over its canonical content.

The same rows with the same scalings have the same digest, however they were uploaded and
whatever else the files say; the base layout and the packing do not enter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from adapters_store.reading import AdapterModule


def content_digest(modules: Iterable[AdapterModule]) -> str:
    """64 hex digits over rank, scaling, types and bytes of each module, in table order."""
    sha = hashlib.sha256(b"manylora adapter 1\n")
    for module in modules:
        fields = (
            f"{module.layer} {module.target} {module.rank} {float(module.scaling).hex()} "
            f"{module.a_dtype} {module.a.shape} {module.b_dtype} {module.b.shape}\n"
        )
        sha.update(fields.encode())
        sha.update(np.ascontiguousarray(module.a).data)
        sha.update(np.ascontiguousarray(module.b).data)
    return sha.hexdigest()
