"""From an upload's parts to a new version in the store, or a refusal with its report."""

from __future__ import annotations

from pathlib import Path

from adapters_store import admission
from adapters_store.errors import AdapterRefused, ArchiveRefused, InvalidAdapterId
from adapters_store.report import Report
from adapters_store.versions import AdapterVersion
from server.api.state import AppState
from server.api.upload import Upload
from server.errors import AdapterUnservable, InvalidRequest


def admit(state: AppState, upload: Upload) -> AdapterVersion | Report:
    """Unpack if it is an archive, check, store; a dry run ends in an accepted report. Blocks.

    Raises InvalidRequest for parts that make no sense together, AdapterUnservable with the report
    for an adapter or archive that is refused.
    """
    adapter_id, dry_run = _adapter_id(state, upload), _dry_run(upload)
    directory = _directory(upload)
    try:
        if "archive" in upload.files:
            admission.extract(
                upload.files["archive"], directory, max_bytes=state.settings.max_upload_bytes
            )
        added = state.store.add(
            adapter_id,
            directory,
            description=upload.texts.get("description", ""),
            dry_run=dry_run,
        )
    except InvalidAdapterId as error:
        raise InvalidRequest(str(error), param="adapter_id") from error
    except ArchiveRefused as error:
        raise AdapterUnservable(
            str(error),
            param="archive",
            code=error.problem.code,
            details={"report": Report(problems=(error.problem,)).to_dict()},
        ) from error
    except AdapterRefused as error:
        raise _refused(error.report) from error
    if isinstance(added, Report) and not added.accepted:
        raise _refused(added)
    return added


def _adapter_id(state: AppState, upload: Upload) -> str:
    adapter_id = upload.texts.get("adapter_id")
    if adapter_id is None:
        raise InvalidRequest(
            "part 'adapter_id' is missing: name the adapter",
            param="adapter_id",
            code="missing_required_parameter",
        )
    if adapter_id == state.model_name:
        raise InvalidRequest(
            f"'{adapter_id}' is the base model's name: choose another", param="adapter_id"
        )
    return adapter_id


def _dry_run(upload: Upload) -> bool:
    given = upload.texts.get("dry_run", "false").lower()
    if given not in ("true", "false", "1", "0"):
        raise InvalidRequest(
            f"'dry_run' = {given[:80]!r} is invalid: use true or false", param="dry_run"
        )
    return given in ("true", "1")


def _directory(upload: Upload) -> Path:
    """Where the adapter's two files are or will be; InvalidRequest if parts are missing."""
    files = upload.files
    if "archive" in files:
        if len(files) > 1:
            raise InvalidRequest(
                "parts 'archive' and 'config' or 'weights' exclude each other: send one archive, "
                "or the two files",
                param="archive",
            )
        directory = files["archive"].parent / "adapter"
        directory.mkdir()
        return directory
    for part in ("config", "weights"):
        if part not in files:
            raise InvalidRequest(
                f"part '{part}' is missing: send the files 'config' (adapter_config.json) and "
                "'weights' (adapter_model.safetensors), or one 'archive' of both",
                param=part,
                code="missing_required_parameter",
            )
    return files["config"].parent


def _refused(report: Report) -> AdapterUnservable:
    first = report.problems[0]
    more = len(report.problems) - 1
    return AdapterUnservable(
        f"the adapter was refused: {first}" + (f" (and {more} more, see report)" if more else ""),
        param="adapter",
        details={"report": report.to_dict()},
    )
