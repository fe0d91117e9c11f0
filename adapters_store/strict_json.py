"""JSON objects from strangers: no duplicate keys, no NaN, no Infinity, no surprises."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def parse_object(raw: bytes) -> dict[str, Any]:
    """The one JSON object in `raw`, UTF-8; ValueError says what is wrong with it."""
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("it holds no JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return unique


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
