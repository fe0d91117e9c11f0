"""Every error of the adapter store, drawn as a tree.

AdapterStoreError
├── InvalidAdapterId     the name is not in the grammar of `adapters_store.ids`
├── UnknownAdapter       no such name, version or digest for this base model
├── AdapterRefused       the adapter cannot be served; carries the report
├── ArchiveRefused       the upload is no archive that we take; carries the problem
├── FileRefused          one file of an adapter is unusable; becomes a problem of the report
├── AdmissionFailed      the checking process could not do its work: our fault, not the file's
├── StoreLocked          another process has the data directory open
└── StoreUnusable        the data directory was written by a newer version
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters_store.report import Problem, Report


class AdapterStoreError(Exception):
    """Everything that this package raises on purpose."""


class InvalidAdapterId(AdapterStoreError):
    """An adapter_id outside the grammar."""


class UnknownAdapter(AdapterStoreError):
    """A reference that names no adapter version of this base model."""

    def __init__(self, reference: str, message: str) -> None:
        super().__init__(message)
        self.reference = reference


class AdapterRefused(AdapterStoreError):
    """An adapter that cannot be served as it is; `report.problems` says why."""

    def __init__(self, report: Report) -> None:
        super().__init__("; ".join(str(problem) for problem in report.problems))
        self.report = report


class ArchiveRefused(AdapterStoreError):
    """An upload that is not one zip, tar or tar.gz with the two files of an adapter."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class FileRefused(AdapterStoreError):
    """A file whose content cannot be read safely or at all."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class AdmissionFailed(AdapterStoreError):
    """The checking process did not answer, for a reason that is not in the file."""


class StoreLocked(AdapterStoreError):
    """The data directory is in use by another process."""


class StoreUnusable(AdapterStoreError):
    """The data directory has a format that this version does not know."""
