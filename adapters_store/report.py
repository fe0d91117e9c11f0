"""What an adapter's check found: given before admission, and kept with the version.

Knows no file format; plain frozen data that msgspec and json can write.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MAX_LISTED = 100
"""Names that one list of a report holds at most; the counts beside it are exact."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse an adapter, or one warning."""

    code: str  # stable, for programs
    message: str  # what is wrong: the value and the limit
    remedy: str  # what to do about it

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}"


def grouped(code: str, what: str, details: list[str], remedy: str) -> list[Problem]:
    """One problem for all `details`, three of them shown; none where there are no details."""
    if not details:
        return []
    shown = ", ".join(detail[:160] for detail in details[:3])
    more = f" and {len(details) - 3} more" if len(details) > 3 else ""
    return [Problem(code, f"{what}: {shown}{more}", remedy)]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One linear layer of the base that the adapter changes."""

    name: str  # model.layers.0.self_attn.q_proj
    rank: int
    alpha: float
    scaling: float  # alpha / rank, or alpha / sqrt(rank) with rsLoRA
    dtype: str  # of the saved tensors: F32, F16 or BF16


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The packed rows against a dense product of the saved tensors, random x, in fp64."""

    max_error: float  # largest |packed - dense| over all outputs, relative to the largest |dense|
    max_bound_ratio: float  # largest |packed - dense| / bound from rounding alone; above 1 refuses


@dataclass(frozen=True, slots=True)
class Report:
    """The whole finding. Accepted adapters have no problems, a digest and sizes.

    Lists hold at most MAX_LISTED names. Sizes are those for the layout that was checked against.
    """

    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    harmless_settings: tuple[str, ...] = ()  # read, and without effect on what is served
    declared_base: str | None = None  # base_model_name_or_path
    use_rslora: bool = False
    num_tensors: int = 0
    num_matched: int = 0
    num_unmatched: int = 0
    unmatched: tuple[str, ...] = ()  # tensors that belong to no layer of this base
    unsupported: tuple[str, ...] = ()  # tensors of a kind that is not served
    modules: tuple[ModuleReport, ...] = ()  # by layer, then target
    digest: str | None = None
    num_rows: int = 0
    num_pages: int = 0
    page_waste: float = 0.0  # share of the pages' elements that holds no row element
    file_bytes: int = 0  # the two files as uploaded
    host_bytes: int = 0  # the packed image
    device_bytes: int = 0  # its pages
    self_check: SelfCheck | None = None

    @property
    def accepted(self) -> bool:
        """Whether the adapter can be served."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, with `accepted` first."""
        return {"accepted": self.accepted, **asdict(self)}
