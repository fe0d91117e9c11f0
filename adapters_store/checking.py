"""The whole check of one adapter: read, pack, prove, and write the image if one is wanted.

Runs on files from strangers: call it through `adapters_store.admission`, which can kill it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapters_store.digest import content_digest
from adapters_store.image import build_image, plan_image, write_image
from adapters_store.layout import BaseLayout
from adapters_store.packing import check_layout
from adapters_store.peft_config import CONFIG_FILE
from adapters_store.reading import read_adapter
from adapters_store.report import Problem, Report
from adapters_store.safetensors_header import WEIGHTS_FILE
from adapters_store.self_check import check_image
from adapters_store.sizes import limit_problems, with_sizes


def check_adapter(
    directory: Path,
    layout: BaseLayout,
    *,
    max_rank: int,
    max_pages: int | None = None,
    image_path: Path | None = None,
) -> Report:
    """Report on the adapter in `directory`; accepted ones are written to image_path if given.

    Raises ValueError for an impossible layout and OSError where the disk fails, nothing for
    what the files hold.
    """
    check_layout(layout)
    reading = read_adapter(directory, layout, max_rank)
    report = replace(reading.report, file_bytes=_file_bytes(directory))
    if not report.accepted:
        return report
    packing = plan_image(layout, reading.modules)
    report = with_sizes(report, layout, packing)
    over_limit = limit_problems(report, max_rank, max_pages)
    if over_limit:
        return replace(report, problems=tuple(over_limit))
    image = build_image(layout, reading.modules, packing)
    self_check = check_image(image, reading.modules, layout)
    digest = content_digest(reading.modules)
    report = replace(report, digest=digest, self_check=self_check)
    if not self_check.max_bound_ratio <= 1:
        return replace(report, problems=(_self_check_failed(self_check.max_error),))
    if image_path is not None:
        write_image(image_path, image, layout, digest)
    return report


def _file_bytes(directory: Path) -> int:
    paths = (directory / CONFIG_FILE, directory / WEIGHTS_FILE)
    return sum(path.stat().st_size for path in paths if path.is_file())


def _self_check_failed(error: float) -> Problem:
    return Problem(
        "self_check_failed",
        f"the packed form differs from a dense product by {error:g} of the largest output",
        "report this as a bug, with the adapter",
    )
