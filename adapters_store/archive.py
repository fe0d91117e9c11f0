"""Takes the two files of an adapter out of one zip, tar or tar.gz, whatever else it holds.

They lie at its root or in one top folder. Everything else is skipped. Hostile archives cost at
most `max_bytes` of decompression; memory is bounded by the process that this runs in.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from adapters_store.errors import ArchiveRefused
from adapters_store.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters_store.reading import missing_files
from adapters_store.report import Problem
from adapters_store.safetensors_header import WEIGHTS_FILE

MAX_MEMBERS = 1000
COPY_BYTES = 1 << 20

_PACK_AGAIN = "pack adapter_config.json and adapter_model.safetensors into one zip, tar or tar.gz"


def extract(archive: Path, directory: Path, *, max_bytes: int) -> None:
    """Write the two files into `directory`; ArchiveRefused where that is not possible.

    max_bytes: of all decompressed content together. Only the two fixed names are ever written.
    """
    unpacking = _Unpacking(directory, max_bytes)
    with archive.open("rb") as file, _refusing_broken():
        start = file.read(4)
        file.seek(0)
        if start in (b"PK\x03\x04", b"PK\x05\x06"):
            _read_zip(file, unpacking)
        elif start[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file, mode="rb") as plain:
                _read_tar(plain, unpacking, max_bytes)
        else:
            _read_tar(file, unpacking, max_bytes)
    unpacking.finish()


@contextmanager
def _refusing_broken() -> Iterator[None]:
    errors = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile)
    try:
        yield
    except (*errors, ValueError, NotImplementedError) as error:
        message = f"the archive is no sound zip, tar or tar.gz: {str(error)[:200] or 'cut off'}"
        raise _refused("broken_archive", message, _PACK_AGAIN) from error


def _read_zip(file: IO[bytes], unpacking: _Unpacking) -> None:
    with zipfile.ZipFile(file) as zipped:
        for info in zipped.infolist():
            path = unpacking.visit(info.filename)
            if info.is_dir():
                continue
            # The upper bits are the Unix file type, 0 where the archiver gave none.
            if info.external_attr >> 28 not in (0, 8):
                raise _special(path)
            if not unpacking.wants(path):
                continue
            if info.flag_bits & 1 or info.compress_type not in (0, zipfile.ZIP_DEFLATED):
                message = f"{path} is encrypted or compressed by an uncommon method"
                raise _refused("broken_archive", message, "use plain zip without a password")
            with zipped.open(info) as source:
                unpacking.write(source, path)


def _read_tar(file: IO[bytes] | gzip.GzipFile, unpacking: _Unpacking, max_bytes: int) -> None:
    # Headers and padding come on top of the content.
    bounded = _BoundedReader(file, _Budget(max_bytes + COPY_BYTES))
    with tarfile.open(fileobj=io.BufferedReader(bounded, COPY_BYTES), mode="r|") as tar:
        for info in tar:
            path = unpacking.visit(info.name)
            if info.isdir():
                continue
            if not info.isreg():
                raise _special(path)
            if unpacking.wants(path):
                source = tar.extractfile(info)
                assert source is not None, "a regular member has content"
                unpacking.write(source, path)


class _Unpacking:
    """What was found so far; files at the root go before those in a folder."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._budget = _Budget(max_bytes)
        self._num_members = 0
        self._names: set[str] = set()  # of members at the root or in a top folder
        self._taken: dict[str, PurePosixPath] = {}
        self._has_rivals = False  # the same file in two top folders

    def visit(self, name: str) -> PurePosixPath:
        """Count one member and check its path."""
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            message = f"the archive has more than {MAX_MEMBERS} members"
            raise _refused("broken_archive", message, _PACK_AGAIN)
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            message = f"the member {name[:120]!r} points outside of the archive"
            raise _refused("unsafe_archive", message, _PACK_AGAIN)
        return path

    def wants(self, path: PurePosixPath) -> bool:
        """Whether this regular file is to be written, over a deeper one if there is one."""
        if not 1 <= len(path.parts) <= 2 or path.parts[0] == "__MACOSX":
            return False
        self._names.add(path.name)
        if path.name not in (CONFIG_FILE, WEIGHTS_FILE):
            return False
        rival = self._taken.get(path.name)
        if rival == path:
            message = f"{str(path)[:120]!r} is in the archive twice"
            raise _refused("broken_archive", message, _PACK_AGAIN)
        if rival is not None and len(rival.parts) == len(path.parts):
            self._has_rivals = True
        return rival is None or len(rival.parts) > len(path.parts)

    def write(self, source: IO[bytes], path: PurePosixPath) -> None:
        """Write one of the two files."""
        self._taken[path.name] = path
        written = 0
        with (self._directory / path.name).open("wb") as file:
            while chunk := source.read(COPY_BYTES):
                self._budget.spend(len(chunk))
                written += len(chunk)
                if path.name == CONFIG_FILE and written > MAX_CONFIG_BYTES:
                    message = f"{path.name} has more than {MAX_CONFIG_BYTES} bytes"
                    raise _refused("invalid_config", message, "shrink it")
                file.write(chunk)

    def finish(self) -> None:
        """Both files must be there, side by side, and be the only ones of their depth."""
        problems = missing_files(self._names)
        if problems:
            raise ArchiveRefused(problems[0])
        folders = {path.parent for path in self._taken.values()}
        if len(folders) > 1 or (self._has_rivals and folders != {PurePosixPath(".")}):
            message = "the files lie in several folders of the archive"
            raise _refused("broken_archive", message, _PACK_AGAIN)


class _Budget:
    """Bytes that may still be decompressed."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._left = max_bytes

    def spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise _refused(
                "archive_too_large",
                f"the archive unpacks to more than {self._max_bytes} bytes",
                "upload only the two files, or raise the server's max_upload_bytes",
            )


class _BoundedReader(io.RawIOBase):
    """Reads from `file` until the budget is spent."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, budget: _Budget) -> None:
        super().__init__()
        self._file = file
        self._budget = budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        chunk = self._file.read(len(buffer))
        self._budget.spend(len(chunk))
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _special(path: PurePosixPath) -> ArchiveRefused:
    message = f"the member {str(path)[:120]!r} is a link or a device"
    return _refused("unsafe_archive", message, "archive the files themselves (tar --dereference)")


def _refused(code: str, message: str, remedy: str) -> ArchiveRefused:
    return ArchiveRefused(Problem(code, message, remedy))
