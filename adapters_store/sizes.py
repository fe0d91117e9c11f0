"""What an adapter occupies when packed for a layout, without its weights."""

from __future__ import annotations

from dataclasses import replace

from adapters_store.layout import BaseLayout
from adapters_store.module_checks import rank_problems
from adapters_store.packing import Packing, pack_rows, row_sizes
from adapters_store.report import Problem, Report
from adapters_store.targets import module_name, places

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROW_BYTES = 8 + 4
"""An entry of row_offset and one of row_scale."""


def with_sizes(report: Report, layout: BaseLayout, packing: Packing) -> Report:
    """The report with rows, pages and bytes of this packing."""
    num_rows = len(packing.row_offset)
    page_bytes = layout.page_elements * ELEMENT_BYTES[layout.dtype]
    table_bytes = 4 * (layout.num_layers * len(layout.targets) + 1) + ROW_BYTES * num_rows
    return replace(
        report,
        num_rows=num_rows,
        num_pages=packing.num_pages,
        page_waste=packing.waste,
        host_bytes=packing.num_pages * page_bytes + table_bytes,
        device_bytes=packing.num_pages * page_bytes,
    )


def resized(report: Report, layout: BaseLayout) -> Report:
    """An accepted report with the sizes that the same adapter has in `layout`."""
    ranks = {module.name: module.rank for module in report.modules}
    by_place = {place: ranks.get(module_name(*place), 0) for place in places(layout)}
    packing = pack_rows(row_sizes(layout, by_place), layout.page_elements)
    return with_sizes(report, layout, packing)


def limit_problems(report: Report, max_rank: int, max_pages: int | None) -> list[Problem]:
    """What of an otherwise accepted adapter exceeds the server's limits."""
    problems = rank_problems({module.name: module.rank for module in report.modules}, max_rank)
    if max_pages is not None and report.num_pages > max_pages:
        problems.append(
            Problem(
                "too_many_pages",
                f"the adapter needs {report.num_pages} pages, one may have at most {max_pages}",
                "lower its rank or target fewer modules, or start the server with a larger pool",
            )
        )
    return problems
