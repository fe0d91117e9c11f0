"""What a rival is: something that can be launched for some cases and asked the workload's requests.

Rivals that are servers differ in command, request and event; how they are driven is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.rivals.environments import RIVALS
from bench.rivals.expected import check_answers, read_expected
from bench.rivals.server_process import free_port, running
from bench.rivals.streaming import Request, ask_all
from bench.rivals.workload import Case, Trace, Workload

NUM_WARM_UP = 4
"""Output tokens of each request of the round that warms a case up."""


@dataclass(frozen=True)
class Launch:
    """One process of a rival and the cases that it is asked; `{port}` in `command` is filled in."""

    variant: str  # of the rival, as the table tells it apart; empty where there is one
    cases: tuple[Case, ...]
    num_adapters: int  # that are loaded
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def log(self, name: str) -> Path:
        """Where the process of the rival `name` writes what it says."""
        concurrency = "-".join(
            str(number) for number in sorted({c.concurrency for c in self.cases})
        )
        words = [name, *self.variant.split(), f"adapters-{self.num_adapters}", f"at-{concurrency}"]
        return RIVALS / "logs" / f"{'-'.join(words)}.log"


class Rival(Protocol):
    """One row, or a few rows, of the table."""

    name: str  # on the command line
    title: str  # in the table
    settings: str  # which settings were chosen as its best, for the record

    def problem(self) -> str | None:
        """Why it cannot run, and the remedy; None where it can."""

    def versions(self) -> dict[str, str]:
        """The versions of what it consists of."""

    def launches(self, cases: Sequence[Case]) -> list[Launch]:
        """Processes that together answer those of `cases` which it can."""

    def measure(self, launch: Launch, workload: Workload) -> Iterator[tuple[Case, list[Trace]]]:
        """Start it, hold its answers against the expected ones, warm up and run each case.

        Raises RivalError where it cannot be started, fails, or answers something else.
        """


class ServerRival(ABC):
    """A rival that is an HTTP server with streamed completions."""

    name: str
    title: str
    settings: str
    ready_path: str

    @abstractmethod
    def request(self, prompt: list[int], num_output: int, adapter: int | None) -> Request:
        """A greedy completion of exactly `num_output` tokens."""

    def measure(self, launch: Launch, workload: Workload) -> Iterator[tuple[Case, list[Trace]]]:
        """As of Rival."""
        port = free_port()
        command = tuple(word.replace("{port}", str(port)) for word in launch.command)
        log = launch.log(self.name)
        with running(command, launch.environment, port, self.ready_path, log):
            self._check(port, launch.num_adapters)
            for case in launch.cases:
                self._ask(port, workload, case, num_output=NUM_WARM_UP)
                yield case, self._ask(port, workload, case, workload.num_output)

    def _check(self, port: int, num_adapters: int) -> None:
        expected = read_expected(num_adapters)
        requests = [self.request(e.prompt, 1, e.adapter) for e in expected]
        answers = ask_all(port, requests, concurrency=len(requests))
        check_answers(self.name, expected, [answer.text for answer in answers])

    def _ask(self, port: int, workload: Workload, case: Case, num_output: int) -> list[Trace]:
        asked = zip(workload.prompts(case), workload.adapters(case), strict=True)
        requests = [self.request(p, num_output, a) for p, a in asked]
        return [answer.trace for answer in ask_all(port, requests, case.concurrency)]


def openai_text(event: dict[str, Any]) -> str | None:
    """The text of a chunk of /v1/completions; None where it brings no token."""
    for choice in event["choices"]:
        if choice["text"] or choice.get("token_ids"):
            text: str = choice["text"]
            return text
    return None


def openai_count(event: dict[str, Any]) -> int | None:
    """The number of tokens, from the chunk with the usage."""
    usage = event.get("usage")
    return usage["completion_tokens"] if usage else None
