"""Files that are complete or not there, over a crash at any moment; and one owner at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from adapters_store.errors import StoreLocked


def sync_file(path: Path) -> None:
    """Return once the file's content is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Return once the directory's entries are on the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def publish(temporary: Path, final: Path) -> None:
    """Rename a synced file or directory to its final name, for good.

    Both must be on one file system. `final` must not be a non-empty directory.
    """
    os.replace(temporary, final)
    sync_directory(final.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory tree; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock_directory(directory: Path) -> int:
    """Take the directory for this process; returns a descriptor whose closing gives it back.

    The lock ends with the process, however that ends. StoreLocked names the holder.
    """
    path = directory / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreLocked(
            f"the data directory {directory} is in use by the process with pid {holder}: stop "
            "that server, or start this one with another data_dir"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
