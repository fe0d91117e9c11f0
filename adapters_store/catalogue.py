"""The SQLite database of names, versions and the audit trail; knows no files.

A name points at one version for each base: `base_key` keeps the adapters of bases with other
shapes apart. Version numbers count up for each name, over all bases, and are never used again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from adapters_store.errors import StoreUnusable

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE counters (adapter_id TEXT PRIMARY KEY, last_version INTEGER NOT NULL) STRICT;
CREATE TABLE versions (
    adapter_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    base_key TEXT NOT NULL,
    digest TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    description TEXT NOT NULL,
    layout_key TEXT NOT NULL,
    report BLOB NOT NULL,
    PRIMARY KEY (adapter_id, version),
    UNIQUE (adapter_id, base_key, digest)
) STRICT;
CREATE INDEX versions_by_digest ON versions (digest);
CREATE TABLE names (
    adapter_id TEXT NOT NULL,
    base_key TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (adapter_id, base_key),
    FOREIGN KEY (adapter_id, version) REFERENCES versions (adapter_id, version)
) STRICT;
CREATE TABLE audit (
    id INTEGER PRIMARY KEY,
    at INTEGER NOT NULL,
    action TEXT NOT NULL,
    adapter_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL
) STRICT;
"""

_ROW_COLUMNS = "adapter_id, version, digest, created_at, description, layout_key, report"


class VersionRow(NamedTuple):
    """One version as stored; the report is JSON, its sizes those for layout_key."""

    adapter_id: str
    version: int
    digest: str
    created_at: int  # unix seconds
    description: str
    layout_key: str
    report: bytes


class Catalogue:
    """One connection; its user serialises the calls. Every change is one transaction."""

    def __init__(self, path: Path, base_key: str) -> None:
        self._base_key = base_key
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._open(path)
        except BaseException:
            self._db.close()
            raise

    def _open(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found == 0:
            self._db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        elif found != SCHEMA_VERSION:
            raise StoreUnusable(
                f"{path} has format {found}, this version reads {SCHEMA_VERSION}: use the "
                "manylora version that wrote it, or another data_dir"
            )

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def current(self, adapter_id: str) -> int | None:
        """The version that the name points at; None where there is no such name."""
        found = self._db.execute(
            "SELECT version FROM names WHERE adapter_id = ? AND base_key = ?",
            (adapter_id, self._base_key),
        ).fetchone()
        return found[0] if found else None

    def names(self) -> list[tuple[str, int]]:
        """Every name of this base with its current version, sorted."""
        return self._db.execute(
            "SELECT adapter_id, version FROM names WHERE base_key = ? ORDER BY adapter_id",
            (self._base_key,),
        ).fetchall()

    def is_known_elsewhere(self, adapter_id: str) -> bool:
        """Whether the name exists for a base with other shapes."""
        return bool(
            self._db.execute(
                "SELECT 1 FROM names WHERE adapter_id = ? LIMIT 1", (adapter_id,)
            ).fetchone()
        )

    def version_numbers(self, adapter_id: str) -> list[int]:
        """The versions of the name for this base, oldest first."""
        found = self._db.execute(
            "SELECT version FROM versions WHERE adapter_id = ? AND base_key = ? ORDER BY version",
            (adapter_id, self._base_key),
        )
        return [version for (version,) in found]

    def version(self, adapter_id: str, version: int) -> VersionRow | None:
        """One version of this base."""
        found = self._db.execute(
            f"SELECT {_ROW_COLUMNS} FROM versions "
            "WHERE adapter_id = ? AND version = ? AND base_key = ?",
            (adapter_id, version, self._base_key),
        ).fetchone()
        return VersionRow(*found) if found else None

    def version_with_digest(self, adapter_id: str, digest_prefix: str) -> int | None:
        """The newest version of this name whose digest begins so; the prefix is hex digits."""
        found = self._db.execute(
            "SELECT version FROM versions WHERE adapter_id = ? AND base_key = ? "
            "AND digest GLOB ? || '*' ORDER BY version DESC LIMIT 1",
            (adapter_id, self._base_key, digest_prefix),
        ).fetchone()
        return found[0] if found else None

    def digests(self) -> set[str]:
        """The digests that some version of any base refers to."""
        found = self._db.execute("SELECT DISTINCT digest FROM versions")
        return {digest for (digest,) in found}

    def is_referenced(self, digest: str) -> bool:
        """Whether some version of any base has this digest."""
        found = self._db.execute("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,))
        return found.fetchone() is not None

    def add_version(self, row: VersionRow) -> None:
        """Keep a version with the number that `next_version` gave; the name points at it."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO counters VALUES (?, ?) "
                "ON CONFLICT DO UPDATE SET last_version = excluded.last_version",
                (row.adapter_id, row.version),
            )
            self._db.execute(
                f"INSERT INTO versions (base_key, {_ROW_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (self._base_key, *row),
            )
            self._point(row.adapter_id, row.version)
            self._audit(row.created_at, "add", row.adapter_id, row.version, row.digest)

    def next_version(self, adapter_id: str) -> int:
        """The number that the name's next version gets: one more than any it ever had."""
        found = self._db.execute(
            "SELECT last_version FROM counters WHERE adapter_id = ?", (adapter_id,)
        ).fetchone()
        return found[0] + 1 if found else 1

    def point_at(self, adapter_id: str, version: int, digest: str, at: int) -> None:
        """Let the name point at one of its versions."""
        with self._transaction():
            self._point(adapter_id, version)
            self._audit(at, "point", adapter_id, version, digest)

    def delete(self, adapter_id: str, at: int) -> None:
        """Remove the name of this base with all its versions; their numbers stay used."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO audit (at, action, adapter_id, version, digest) "
                "SELECT ?, 'delete', adapter_id, version, digest FROM versions "
                "WHERE adapter_id = ? AND base_key = ?",
                (at, adapter_id, self._base_key),
            )
            for table in ("names", "versions"):
                self._db.execute(
                    f"DELETE FROM {table} WHERE adapter_id = ? AND base_key = ?",
                    (adapter_id, self._base_key),
                )

    def _point(self, adapter_id: str, version: int) -> None:
        self._db.execute(
            "INSERT INTO names VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET version = excluded.version",
            (adapter_id, self._base_key, version),
        )

    def _audit(self, at: int, action: str, adapter_id: str, version: int, digest: str) -> None:
        self._db.execute(
            "INSERT INTO audit (at, action, adapter_id, version, digest) VALUES (?, ?, ?, ?, ?)",
            (at, action, adapter_id, version, digest),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
