"""Cases that are played for several seeds, what each of them shows, and bars held against it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.http_load import across_seeds
from bench.load_test import service
from bench.replay import figures, steady_rate
from bench.simulation.engine import Setup
from bench.simulation.fleet import Fleet
from bench.simulation.replay import Run, play
from bench.workloads import Trace

THROUGHPUT = "completed_per_second"
"""S-LoRA's: completed requests over the time to the last completion."""

SLO_SECONDS = 6.0
"""S-LoRA's time to first token."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table: what is played on what; labels tell it from the others."""

    labels: dict[str, Any]
    setup: Setup
    fleet: Fleet
    trace: Callable[[int], Trace]  # of a seed


@dataclass(frozen=True, slots=True)
class Row:
    """What a case came to, for each seed."""

    labels: dict[str, Any]
    runs: list[dict[str, float]]

    def values(self, figure: str) -> list[float]:
        return [run[figure] for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        return {**self.labels, **across_seeds(self.runs)}


@dataclass(frozen=True, slots=True)
class Bar:
    """A stated limit and the figure of each seed; the median decides."""

    name: str
    values: list[float]
    limit: float
    is_least: bool  # or else the limit is the most

    @property
    def holds(self) -> bool:
        middle = statistics.median(self.values)
        return middle >= self.limit if self.is_least else middle <= self.limit

    def to_json(self) -> dict[str, Any]:
        limit = {"at_least" if self.is_least else "at_most": self.limit}
        spread = {"min": min(self.values), "max": max(self.values)}
        value = {"median": statistics.median(self.values), **spread}
        return {"bar": self.name, "value": value, **limit, "holds": self.holds}


@dataclass(frozen=True, slots=True)
class Experiment:
    """The rows of one question, and its bars."""

    name: str
    title: str
    rows: list[Row]
    bars: list[Bar] = field(default_factory=list)

    def find(self, **labels: Any) -> Row:
        """The row that has these labels; KeyError unless there is exactly one."""
        found = [row for row in self.rows if labels.items() <= row.labels.items()]
        if len(found) != 1:
            raise KeyError(f"{len(found)} rows of {self.name} have {labels}")
        return found[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [row.to_json() for row in self.rows],
            "bars": [bar.to_json() for bar in self.bars],
        }


def measure(
    cases: Iterable[Case],
    seeds: Sequence[int],
    also: Callable[[Run], dict[str, float]] | None = None,
) -> list[Row]:
    """Play every case for every seed; `also` gives figures of a run beside the usual ones."""
    rows = []
    for case in cases:
        played = (play(case.trace(seed), case.setup, case.fleet) for seed in seeds)
        rows.append(
            Row(case.labels, [{**shown(run), **(also(run) if also else {})} for run in played])
        )
    return rows


def saturation(case: Case, seeds: Sequence[int]) -> float:
    """Steady completions a second of a case that offers more; the median over seeds.

    In order of arrival: any other lets short or cheap requests go first, and looks faster until
    the others' turn comes.
    """
    in_order = dataclasses.replace(case, setup=dataclasses.replace(case.setup, is_fair=False))
    return statistics.median(measure([in_order], seeds)[0].values("steady_per_second"))


def ratios(above: Row, below: Row, figure: str = THROUGHPUT) -> list[float]:
    """Of one figure in two rows, seed by seed."""
    pairs = zip(above.values(figure), below.values(figure), strict=True)
    return [a / b for a, b in pairs]


def shown(run: Run) -> dict[str, float]:
    """The figures of a run. Per-step means are over steps; rates over all of its virtual time."""
    counts, timelines = run.counts, run.timelines
    found = figures(timelines)
    del found["send_lag_p99_seconds"]  # a virtual sender is never late
    spent = counts.base_seconds + counts.adapter_seconds + counts.fixed_seconds
    return {
        **found,
        "steady_per_second": steady_rate(timelines),
        **service(timelines, SLO_SECONDS),
        "num_steps": counts.num_steps,
        "distinct_requested": run.trace.num_distinct,
        "distinct_per_step": counts.num_distinct / counts.num_steps,
        "most_distinct_per_step": counts.most_distinct,
        "running_per_step": counts.num_sequences / counts.num_steps,
        "loads_per_second": run.num_loads / run.seconds,
        "loaded_gb_per_second": run.loaded_bytes / run.seconds / 1e9,
        "num_evictions": run.num_evictions,
        "num_preemptions": run.num_preemptions,
        "adapter_share_of_time": counts.adapter_seconds / spent,
        "fixed_share_of_time": counts.fixed_seconds / spent,
    }
