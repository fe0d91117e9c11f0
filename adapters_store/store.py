"""Adapters that survive: names and versions, their files by digest, their packed images.

root/adapters.sqlite                        names, versions, audit
root/files/<digest>/                        the two files as uploaded
root/images/<digest>.<layout>.safetensors   packed for one base layout
root/tmp/                                   work in progress; emptied at the next opening
root/lock                                   the process that has the store open
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, overload

import msgspec

from adapters_store import admission, durable
from adapters_store.catalogue import Catalogue, VersionRow
from adapters_store.errors import AdapterRefused, InvalidAdapterId, UnknownAdapter
from adapters_store.ids import check_adapter_id, parse_reference
from adapters_store.intake import copy_files, max_weights_bytes
from adapters_store.layout import BaseLayout
from adapters_store.packing import check_layout
from adapters_store.report import Report
from adapters_store.sizes import limit_problems, resized
from adapters_store.versions import Adapter, AdapterVersion


class AdapterStore:
    """The adapters of one data directory, for one base; one process at a time.

    Invariants, over a crash at any moment: a version in the catalogue has its files; files and
    images that no version refers to are removed when the store is opened; an image that is there
    is complete. Versions are immutable and their numbers are never used again.
    Every method may be called from any thread.
    """

    def __init__(
        self, root: Path, layout: BaseLayout, *, max_rank: int, max_pages: int | None
    ) -> None:
        """Open or create the store under `root`.

        max_rank: highest rank of a module. max_pages: most pages of one adapter, None for no
        limit. Raises StoreLocked, StoreUnusable, or ValueError for an impossible layout.
        """
        check_layout(layout)
        self._layout = layout
        self._max_rank = max_rank
        self._max_pages = max_pages
        self._files, self._images, self._tmp = root / "files", root / "images", root / "tmp"
        root.mkdir(parents=True, exist_ok=True)
        self._lock_descriptor = durable.lock_directory(root)
        try:
            durable.remove(self._tmp)
            for directory in (self._files, self._images, self._tmp):
                directory.mkdir(exist_ok=True)
            durable.sync_directory(root)
            self._catalogue = Catalogue(root / "adapters.sqlite", _base_key(layout))
        except BaseException:
            os.close(self._lock_descriptor)
            raise
        # Guards the catalogue, the cache, and the agreement of both with the files.
        self._lock = threading.RLock()
        self._repacking = threading.Lock()
        self._cache: dict[tuple[str, int], AdapterVersion] = {}  # versions never change
        self._remove_orphans()

    def close(self) -> None:
        """Give the directory back; no other method may be called after it."""
        with self._lock:
            self._catalogue.close()
            os.close(self._lock_descriptor)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh directory for an upload, on the store's disk; removed at the end, always."""
        with tempfile.TemporaryDirectory(dir=self._tmp, ignore_cleanup_errors=True) as path:
            yield Path(path)

    @overload
    def add(
        self,
        adapter_id: str,
        directory: Path,
        *,
        description: str = "",
        dry_run: Literal[False] = False,
    ) -> AdapterVersion: ...

    @overload
    def add(
        self, adapter_id: str, directory: Path, *, description: str = "", dry_run: Literal[True]
    ) -> Report: ...

    @overload
    def add(
        self, adapter_id: str, directory: Path, *, description: str = "", dry_run: bool
    ) -> AdapterVersion | Report: ...

    def add(
        self, adapter_id: str, directory: Path, *, description: str = "", dry_run: bool = False
    ) -> AdapterVersion | Report:
        """Check the PEFT adapter in `directory` and keep it as a version of adapter_id.

        Content that the name has already is that version again, and the name points at it;
        other content is the next version. With dry_run nothing is kept and the report returned,
        accepted or not. Raises InvalidAdapterId, AdapterRefused, AdmissionFailed, or OSError
        where the disk fails; nothing is kept then.
        """
        check_adapter_id(adapter_id)
        with self.staging() as work:
            image = work / "image"
            report = self._check(directory, work / "files", None if dry_run else image)
            if dry_run:
                return report
            if report.digest is None or not report.accepted:
                raise AdapterRefused(report)
            for path in (image, *(work / "files").iterdir(), work / "files"):
                durable.sync_file(path)
            with self._lock:
                return self._keep(adapter_id, description, report, work)

    def resolve(self, reference: str) -> AdapterVersion:
        """The version that `name`, `name@3` or `name@sha256:…` means now.

        Raises UnknownAdapter for everything else, malformed references too.
        """
        try:
            wanted = parse_reference(reference)
        except InvalidAdapterId as error:
            raise UnknownAdapter(reference, f"there is no adapter: {error}") from error
        with self._lock:
            if wanted.digest_prefix is not None:
                version = self._catalogue.version_with_digest(
                    wanted.adapter_id, wanted.digest_prefix
                )
            else:
                version = wanted.version or self._catalogue.current(wanted.adapter_id)
            found = None if version is None else self._version(wanted.adapter_id, version)
            if found is None:
                raise self._unknown(reference, wanted.adapter_id)
            return found

    def get(self, adapter_id: str) -> Adapter:
        """The adapter with all its versions; UnknownAdapter where there is none."""
        with self._lock:
            current = self._catalogue.current(adapter_id)
            if current is None:
                raise self._unknown(adapter_id, adapter_id)
            return self._adapter(adapter_id, current)

    def adapters(self) -> list[Adapter]:
        """Every adapter of this base, by name."""
        with self._lock:
            return [self._adapter(name, current) for name, current in self._catalogue.names()]

    def delete(self, adapter_id: str) -> tuple[AdapterVersion, ...]:
        """Remove the name and its versions, and the content that no other name has.

        Returns the removed versions; UnknownAdapter where there is no such name.
        """
        with self._lock:
            versions = self.get(adapter_id).versions
            self._catalogue.delete(adapter_id, _now())
            for version in versions:
                self._cache.pop((adapter_id, version.version), None)
            for digest in {version.digest for version in versions}:
                if not self._catalogue.is_referenced(digest):
                    self._remove_content(digest)
            return versions

    def image(self, version: AdapterVersion) -> Path:
        """The packed image of a version for this layout; packed again where it is missing.

        Raises UnknownAdapter where the version was deleted, AdapterRefused where it does not fit
        the limits any more, AdmissionFailed or OSError where packing fails.
        """
        problems = limit_problems(version.report, self._max_rank, self._max_pages)
        if problems:
            raise AdapterRefused(replace(version.report, problems=tuple(problems)))
        path = self._image_path(version.digest)
        if path.exists():
            return path
        with self._repacking, self.staging() as work:
            if path.exists():
                return path
            files = self._files / version.digest
            report = self._check(files, work / "files", work / "image")
            if not report.accepted or report.digest != version.digest:
                self.resolve(version.reference)
                raise AdapterRefused(report)
            durable.sync_file(work / "image")
            with self._lock:
                self.resolve(version.reference)
                durable.publish(work / "image", path)
        return path

    def _check(self, source: Path, files: Path, image: Path | None) -> Report:
        """Copy the adapter to `files`, report on the copy, write `image` if it is accepted."""
        largest = max_weights_bytes(self._layout, self._max_rank)
        problems = copy_files(source, files, largest)
        if problems:
            return Report(problems=tuple(problems))
        return admission.check(
            files,
            self._layout,
            max_rank=self._max_rank,
            max_pages=self._max_pages,
            image_path=image,
        )

    def _keep(
        self, adapter_id: str, description: str, report: Report, work: Path
    ) -> AdapterVersion:
        """Files first, then the catalogue: what it names is there."""
        digest = str(report.digest)
        if not (self._files / digest).exists():
            durable.publish(work / "files", self._files / digest)
        if not self._image_path(digest).exists():
            durable.publish(work / "image", self._image_path(digest))
        version = self._catalogue.version_with_digest(adapter_id, digest)
        if version is None:
            version = self._catalogue.next_version(adapter_id)
            encoded = msgspec.json.encode(report)
            key = self._layout.key
            self._catalogue.add_version(
                VersionRow(adapter_id, version, digest, _now(), description, key, encoded)
            )
        elif version != self._catalogue.current(adapter_id):
            self._catalogue.point_at(adapter_id, version, digest, _now())
        kept = self._version(adapter_id, version)
        assert kept is not None, "a version that was just added is there"
        return kept

    def _version(self, adapter_id: str, version: int) -> AdapterVersion | None:
        key = (adapter_id, version)
        if key not in self._cache:
            row = self._catalogue.version(adapter_id, version)
            if row is None:
                return None
            self._cache[key] = self._from_row(row)
        return self._cache[key]

    def _from_row(self, row: VersionRow) -> AdapterVersion:
        report = msgspec.json.decode(row.report, type=Report)
        if row.layout_key != self._layout.key:
            report = resized(report, self._layout)
        return AdapterVersion(
            adapter_id=row.adapter_id,
            version=row.version,
            digest=row.digest,
            created_at=row.created_at,
            description=row.description,
            report=report,
            num_pages=report.num_pages,
            bytes=report.file_bytes + report.host_bytes,
        )

    def _adapter(self, adapter_id: str, current: int) -> Adapter:
        numbers = self._catalogue.version_numbers(adapter_id)
        versions = [self._version(adapter_id, number) for number in numbers]
        present = tuple(version for version in versions if version is not None)
        return Adapter(adapter_id, present[numbers.index(current)], present)

    def _unknown(self, reference: str, adapter_id: str) -> UnknownAdapter:
        message = f"there is no adapter {reference!r}"
        if self._catalogue.current(adapter_id) is not None:
            numbers = self._catalogue.version_numbers(adapter_id)
            message += f"; {adapter_id!r} has the versions {', '.join(map(str, numbers[-10:]))}"
        elif self._catalogue.is_known_elsewhere(adapter_id):
            message += " for this base model, only for another one: upload it for this one"
        else:
            message += ": upload it first, or list the adapters for the names that there are"
        return UnknownAdapter(reference, message)

    def _image_path(self, digest: str) -> Path:
        return self._images / f"{digest}.{self._layout.key}.safetensors"

    def _remove_content(self, digest: str) -> None:
        # Out of the way at once, so that a removal that fails half-way leaves nothing half there.
        with self.staging() as trash:
            for path in (self._files / digest, *self._images.glob(f"{digest}.*")):
                if path.exists():
                    durable.publish(path, trash / path.name)

    def _remove_orphans(self) -> None:
        """What a crash left between the files and the catalogue."""
        digests = self._catalogue.digests()
        for directory in (self._files, self._images):
            for path in directory.iterdir():
                if path.name.partition(".")[0] not in digests:
                    durable.remove(path)


def _base_key(layout: BaseLayout) -> str:
    """16 hex digits that differ when an adapter of one base cannot fit the other."""
    shapes = {"num_layers": layout.num_layers, "targets": [asdict(t) for t in layout.targets]}
    return hashlib.sha256(msgspec.json.encode(shapes)).hexdigest()[:16]


def _now() -> int:
    return int(time.time())
