"""Names of adapters, and references to their versions.

An adapter_id is `name` or `owner/name`; a reference is an adapter_id, or one followed by
`@3` (a version) or `@sha256:0123456789ab…` (a digest, at least 12 digits of it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapters_store.errors import InvalidAdapterId

MIN_DIGEST_DIGITS = 12
MAX_VERSION = 2**31 - 1

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ADAPTER_ID = re.compile(rf"{_NAME}(?:/{_NAME})?")
_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_DIGEST = re.compile(rf"sha256:([0-9a-f]{{{MIN_DIGEST_DIGITS},64}})")


@dataclass(frozen=True, slots=True)
class Reference:
    """Which version of an adapter is meant; neither version nor digest: the current one."""

    adapter_id: str
    version: int | None = None
    digest_prefix: str | None = None  # 12 to 64 lower-case hex digits


def check_adapter_id(adapter_id: str) -> str:
    """Return adapter_id; InvalidAdapterId where it is not in the grammar."""
    if _ADAPTER_ID.fullmatch(adapter_id):
        return adapter_id
    raise InvalidAdapterId(
        f"adapter_id {_shown(adapter_id)} is not a valid name: use 1 to 128 letters, digits, "
        "'.', '_' or '-', beginning with a letter or digit, optionally as owner/name"
    )


def parse_reference(reference: str) -> Reference:
    """Split `name`, `name@3` or `name@sha256:…`; InvalidAdapterId where it is none of these."""
    adapter_id, separator, selector = reference.partition("@")
    check_adapter_id(adapter_id)
    if not separator:
        return Reference(adapter_id)
    if _VERSION.fullmatch(selector) and int(selector) <= MAX_VERSION:
        return Reference(adapter_id, version=int(selector))
    if match := _DIGEST.fullmatch(selector):
        return Reference(adapter_id, digest_prefix=match[1])
    raise InvalidAdapterId(
        f"{_shown(selector)} after '@' in {_shown(reference)} selects no version: use a number "
        f"from 1, or sha256: and at least {MIN_DIGEST_DIGITS} lower-case hex digits"
    )


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}... ({len(text)} characters)"
