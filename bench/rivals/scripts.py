"""The rivals that are libraries: a script in the rival's environment, told a job, prints JSON.

PEFT's mixed batch (`adapter_names`) for adapters, transformers' continuous batching for the base.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.rivals.environments import PEFT, ROOT, TRANSFORMERS, Environment, RivalError
from bench.rivals.expected import check_answers, read_expected
from bench.rivals.model_files import MODEL, adapter_directory
from bench.rivals.rival import NUM_WARM_UP, Launch
from bench.rivals.workload import Case, Trace, Workload

CHILDREN = Path(__file__).parent / "children"
LIMIT_SECONDS = 3600


class ScriptRival:
    """A library in bf16, in a launch for each number of threads that it is tried with."""

    def __init__(
        self,
        name: str,
        title: str,
        environment: Environment,
        script: str,
        num_threads: dict[str, int],  # by variant
        settings: str,
    ) -> None:
        self.name, self.title, self.settings = name, title, settings
        self._num_threads = num_threads
        self._environment = environment
        self._script = CHILDREN / script
        self._has_adapters = environment is PEFT

    def problem(self) -> str | None:
        is_there = self._environment.is_installed
        return None if is_there else f"run `python -m bench.rivals.setup {self.name}`"

    def versions(self) -> dict[str, str]:
        return self._environment.versions("torch", "transformers", "peft")

    def launches(self, cases: Sequence[Case]) -> list[Launch]:
        own = tuple(case for case in cases if bool(case.num_adapters) is self._has_adapters)
        num_adapters = max((case.num_adapters for case in own), default=0)
        command = (str(self._environment.python), str(self._script))
        return [
            Launch(variant, own, num_adapters, command, {"OMP_NUM_THREADS": str(number)})
            for variant, number in self._num_threads.items()
            if own
        ]

    def measure(self, launch: Launch, workload: Workload) -> Iterator[tuple[Case, list[Trace]]]:
        """As of Rival; the script answers everything before the first result is handed out."""
        log = launch.log(self.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        done = self._run(launch, json.dumps(job(launch, workload)), log)
        if done.returncode:
            raise RivalError(f"{self.name} ended with status {done.returncode}: see {log}")
        results = [json.loads(line) for line in done.stdout.splitlines() if line[:2] == '{"']
        check_answers(self.name, read_expected(launch.num_adapters), results[0]["answers"])
        for case, result in zip(launch.cases, results[1:], strict=True):
            yield (
                case,
                [Trace(sent, tuple(times), count) for sent, times, count in result["traces"]],
            )

    def _run(self, launch: Launch, told: str, log: Path) -> subprocess.CompletedProcess[str]:
        with log.open("w") as errors:
            try:
                return subprocess.run(
                    launch.command,
                    input=told,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"} | launch.environment,
                    timeout=LIMIT_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise RivalError(f"{self.name} took over {LIMIT_SECONDS} s: see {log}") from error


def job(launch: Launch, workload: Workload) -> dict[str, Any]:
    """What the script is told: model, adapters, the requests to check and those to time."""
    expected = read_expected(launch.num_adapters)
    return {
        "model": str(MODEL),
        "adapters": [str(adapter_directory(i)) for i in range(launch.num_adapters)],
        "num_output": workload.num_output,
        "num_warm_up": NUM_WARM_UP,
        "check": {
            "prompts": [entry.prompt for entry in expected],
            "adapters": [entry.adapter for entry in expected],
        },
        "cases": [
            asdict(case) | {"prompts": workload.prompts(case), "adapters": workload.adapters(case)}
            for case in launch.cases
        ],
    }


PEFT_MIXED_BATCH = ScriptRival(
    "peft",
    "PEFT mixed batch",
    PEFT,
    "peft_mixed_batch.py",
    {"one thread": 1, "two threads": 2},
    "one padless batch of `generate` for each wave of requests, `adapter_names` for each row; "
    "model and adapters in bf16; its many small operations may gain nothing from a second thread",
)
CONTINUOUS_BATCHING = ScriptRival(
    "transformers",
    "transformers, continuous batching",
    TRANSFORMERS,
    "continuous_batching.py",
    {"": 2},
    "bf16; scaled-dot-product attention over paged cache, prefix sharing off, both cores",
)
