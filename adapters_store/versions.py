"""What the store hands out: an adapter and its immutable versions."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.report import Report


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One admitted content under one name; sizes are those for the store's layout."""

    adapter_id: str
    version: int
    digest: str  # 64 hex digits
    created_at: int  # unix seconds
    description: str
    report: Report
    num_pages: int
    bytes: int  # on disk: the two files and the packed image

    @property
    def reference(self) -> str:
        """name@version, which always means this content."""
        return f"{self.adapter_id}@{self.version}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name, the version that it points at, and all its versions, oldest first."""

    adapter_id: str
    current: AdapterVersion
    versions: tuple[AdapterVersion, ...]
