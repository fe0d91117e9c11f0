"""What every rival is asked, and what is made of the times at which its tokens came."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_REQUESTS = 4
"""Fewest requests of a case: one stream alone is timed over a few of them."""


@dataclass(frozen=True)
class Case:
    """Requests in flight, and distinct adapters over them; 0 adapters is the base model."""

    concurrency: int
    num_adapters: int


@dataclass(frozen=True)
class Workload:
    """A closed loop of greedy completions of a fixed length, end of sequence ignored.

    `waves` times as many requests as are in flight, at least MIN_REQUESTS; request i asks for
    adapter i modulo their number, and no two prompts are the same.
    """

    num_prompt: int  # tokens
    num_output: int  # tokens
    waves: int

    def num_requests(self, case: Case) -> int:
        """How many requests a case has."""
        return max(self.waves * case.concurrency, MIN_REQUESTS)

    def prompts(self, case: Case) -> list[list[int]]:
        """One prompt of random token ids for each request of a case; the same in every round."""
        return prompt_token_ids(self.num_requests(case), self.num_prompt, seed=0)

    def adapters(self, case: Case) -> list[int | None]:
        """The index of each request's adapter."""
        count = case.num_adapters
        return [i % count if count else None for i in range(self.num_requests(case))]


def prompt_token_ids(count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """`count` prompts of ordinary tokens of a vocabulary of 49152."""
    rows = np.random.default_rng(seed).integers(100, 40000, (count, num_tokens))
    return [[int(token) for token in row] for row in rows]


@dataclass(frozen=True)
class Trace:
    """One request's times in seconds on one clock: when it was sent, when its tokens came.

    A token that came together with another shares its arrival, so there may be fewer arrivals
    than tokens.
    """

    sent: float
    arrivals: tuple[float, ...]
    num_tokens: int


def figures(traces: list[Trace], workload: Workload) -> dict[str, float]:
    """Output tokens per second, time to first token and time between tokens, in milliseconds.

    Raises ValueError where a request has not had all its tokens.
    """
    short = [trace.num_tokens for trace in traces if trace.num_tokens != workload.num_output]
    if short:
        raise ValueError(f"answers of {short} tokens where {workload.num_output} were asked for")
    begin = min(trace.sent for trace in traces)
    seconds = max(trace.arrivals[-1] for trace in traces) - begin
    first = [1e3 * (trace.arrivals[0] - trace.sent) for trace in traces]
    between = [1e3 * gap for trace in traces for gap in np.diff(trace.arrivals)] or [0.0]
    return {
        "output_tokens_per_second": sum(trace.num_tokens for trace in traces) / seconds,
        "ttft_p50_ms": float(np.median(first)),
        "inter_token_p50_ms": float(np.percentile(between, 50)),
        "inter_token_p99_ms": float(np.percentile(between, 99)),
    }
