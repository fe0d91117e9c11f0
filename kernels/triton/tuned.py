"""Tiles that were measured on a GPU: the file that `make tune-gpu` writes, and how it is looked up.

A file holds for one device, and for 16 bits: for each method, shape, number of tokens and of rank
rows, the tiles that were fastest. Without a file for the device there is nothing, and no harm.
"""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from kernels.triton.tiles import MAX_SPLITS, Tile, Tiling, Work, tiling

DIRECTORY = Path(__file__).with_name("tuned")

Shape = tuple[str, int, tuple[int, ...]]
"""Method, inputs, output widths of a span."""


class TunedTiles(NamedTuple):
    """The fastest tiles of one work."""

    shrink: Tile
    expand: Tile
    num_splits: int


Points = dict[tuple[int, int], TunedTiles]
"""By (tokens, rank rows of the widest span)."""


def shape_of(work: Work) -> Shape:
    """What a table is looked up by first."""
    widths = tuple(stop - start for start, stop in pairwise(work.out_start))
    return work.method, work.in_features, widths


def tuned_tiling(work: Work, device_name: str) -> Tiling | None:
    """The tiling of the measured work nearest to `work`; None where its shape was not measured."""
    points = tuned_points(table_path(device_name)).get(shape_of(work))
    if not points or work.itemsize != 2:
        return None
    num_tokens = _nearest(work.num_tokens, {tokens for tokens, _ in points})
    num_rows = _nearest(
        work.max_span_rows, {rows for tokens, rows in points if tokens == num_tokens}
    )
    return tiling(work, *points[num_tokens, num_rows])


def table_path(device_name: str, directory: Path | None = None) -> Path:
    """Where the table of a device lies, "NVIDIA H100 PCIe" in nvidia-h100-pcie.json."""
    return (
        directory or DIRECTORY
    ) / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@cache
def tuned_points(path: Path) -> dict[Shape, Points]:
    """The table in a file, read once; empty where there is no file.

    Raises ValueError naming the file when it is not such a table.
    """
    if not path.is_file():
        return {}
    points: dict[Shape, Points] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["tilings"]:
            shape = (entry["method"], entry["in_features"], tuple(entry["out_widths"]))
            shrink, expand = Tile(**entry["shrink"]), Tile(**entry["expand"])
            found = TunedTiles(shrink, expand, entry["num_splits"])
            if not 1 <= found.num_splits <= MAX_SPLITS[entry["method"]]:
                raise ValueError(f"num_splits is {found.num_splits}: expand cannot sum so many")
            points.setdefault(shape, {})[entry["num_tokens"], entry["num_rows"]] = found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of tuned tiles ({error!r}): remove it, or write it anew with "
            "`make tune-gpu`"
        ) from error
    return points


def write_table(path: Path, about: dict[str, Any], table: dict[Shape, Points]) -> None:
    """Write what `tuned_points` reads; `about` says where and with what it was measured."""
    tilings = [
        {
            "method": method,
            "in_features": in_features,
            "out_widths": widths,
            "num_tokens": num_tokens,
            "num_rows": num_rows,
            "shrink": found.shrink._asdict(),
            "expand": found.expand._asdict(),
            "num_splits": found.num_splits,
        }
        for (method, in_features, widths), points in table.items()
        for (num_tokens, num_rows), found in points.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"tilings": tilings}, indent=1) + "\n", encoding="utf-8")


def _nearest(wanted: int, known: set[int]) -> int:
    """The least of `known` that is at least `wanted`, or else the largest."""
    return min((value for value in known if value >= wanted), default=max(known))
