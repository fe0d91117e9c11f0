"""Request traces that multi-adapter servers are measured with: S-LoRA's, Punica's and Zipf's.

A trace says when each request is due, which adapter it names and how long it is; what the tokens
are is for whoever plays it. Nothing here knows a server. Equal arguments give equal traces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BASE = -1
"""The adapter of a request for the base model."""

SLORA_RANKS = {
    "S1": (8,),
    "S2": (64, 32, 16, 8),
    "S4": (64, 32, 16),
    "S5": (32,),
    "S6": (64,),
}
"""Ranks of S-LoRA's settings; adapter i has rank ranks[i mod len(ranks)]."""

Popularity = Literal["distinct", "uniform", "skewed", "identical"]
POPULARITIES: tuple[Popularity, ...] = ("distinct", "uniform", "skewed", "identical")
PUNICA_SEED = 0xABCDABCD987
PUNICA_GROWTH = 1.5  # of the group sizes of "skewed"

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival; four arrays of one length."""

    due_seconds: Floats  # since the start, ascending
    adapter: Ints  # index of an adapter, or BASE
    num_prompt: Ints  # tokens, at least 1
    num_output: Ints  # tokens, at least 1

    def __len__(self) -> int:
        return len(self.adapter)

    @property
    def num_distinct(self) -> int:
        """Adapters that occur; far fewer than were offered when there are few requests."""
        return len(np.unique(self.adapter[self.adapter != BASE]))

    def base_only(self) -> Trace:
        """The same requests, all for the base model: what is measured beside this trace."""
        return dataclasses.replace(self, adapter=np.full_like(self.adapter, BASE))

    def with_base_share(self, share: float, seed: int = 0) -> Trace:
        """The same requests, a random `share` of them for the base model; ValueError unless 0-1."""
        if not 0 <= share <= 1:
            raise ValueError(f"a base share of {share} is none: give one from 0 to 1")
        chosen = np.random.default_rng(seed).permutation(len(self))[: round(share * len(self))]
        adapter = self.adapter.copy()
        adapter[chosen] = BASE
        return dataclasses.replace(self, adapter=adapter)

    def arriving(self, rate: float, seed: int = 0) -> Trace:
        """The same requests, arriving as a Poisson process of `rate` requests a second."""
        gaps = np.random.default_rng(seed).exponential(1 / rate, len(self))
        return dataclasses.replace(self, due_seconds=np.cumsum(gaps))


def slora(
    num_adapters: int,
    alpha: float,
    rate: float,
    cv: float,
    seconds: float,
    *,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 42,
) -> Trace:
    """S-LoRA's synthetic workload, draw for draw.  (arXiv:2311.03285, its benchmark harness)

    int(rate · seconds) requests. alpha: the CDF of popularity is x^alpha, so 1 is uniform and 0.1
    gives the first adapter most. cv: coefficient of variation of the gaps, 1 = Poisson. lengths:
    prompt and output tokens are uniform from lengths[0] to lengths[1] - 1.
    """
    generator = np.random.RandomState(seed)
    num_requests = int(rate * seconds)
    adapter = np.floor(generator.power(alpha, num_requests) * num_adapters).astype(np.int64)
    num_prompt = generator.randint(*lengths, num_requests).astype(np.int64)
    num_output = generator.randint(*lengths, num_requests).astype(np.int64)
    gaps = generator.gamma(1 / cv**2, cv**2 / rate, num_requests)
    return Trace(np.cumsum(gaps), adapter, num_prompt, num_output)


def punica(
    popularity: Popularity,
    num_requests: int,
    *,
    max_total: int = 2048,
    seed: int = PUNICA_SEED,
) -> Trace:
    """Punica's text generation mix: every request due at once.  (arXiv:2310.18547, sec. 7)

    Prompt lengths are lognormal, -1 + 18·exp(0.8 z); prompt and output together uniform below
    max_total, the output at least 2 tokens. Adapters as `punica_groups` says, in random order.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = 18.0 * np.exp(0.8 * generator.standard_normal(num_requests)) - 1.0
    num_prompt = np.clip(drawn, 1, max_total - 2).astype(np.int64)
    total = np.maximum(num_prompt + 2, generator.integers(0, max_total, num_requests))
    groups = punica_groups(popularity, num_requests)
    adapter = np.repeat(np.arange(len(groups)), groups)
    np.random.Generator(np.random.PCG64(seed)).shuffle(adapter)
    return Trace(np.zeros(num_requests), adapter, num_prompt, total - num_prompt)


def punica_groups(popularity: Popularity, num_requests: int) -> list[int]:
    """How many requests each adapter has, the most popular first; the sum is num_requests.

    distinct: one each; uniform: ⌈√N⌉ adapters, as even as can be; skewed: sizes that grow by 1.5;
    identical: one adapter.
    """
    if popularity == "identical":
        return [num_requests]
    if popularity == "distinct":
        return [1] * num_requests
    if popularity == "uniform":
        size, rest = divmod(num_requests, math.ceil(math.sqrt(num_requests)))
        return [size + (i < rest) for i in range(math.ceil(math.sqrt(num_requests)))]
    groups: list[int] = []
    size_of_next = 1.0
    while sum(groups) + int(size_of_next) < num_requests:
        groups.append(int(size_of_next))
        size_of_next *= PUNICA_GROWTH
    return sorted([*groups, num_requests - sum(groups)], reverse=True)


def zipf(
    num_adapters: int,
    exponent: float,
    num_requests: int,
    *,
    lengths: tuple[int, int] = (8, 512),
    seed: int = 0,
) -> Trace:
    """Adapter i has a share proportional to 1 / (i + 1)^exponent; every request due at once.

    lengths: prompt and output tokens are uniform from lengths[0] to lengths[1] - 1.
    """
    generator = np.random.default_rng(seed)
    weights = np.arange(1, num_adapters + 1) ** -float(exponent)
    adapter = generator.choice(num_adapters, num_requests, p=weights / weights.sum())
    num_prompt, num_output = generator.integers(*lengths, (2, num_requests))
    return Trace(np.zeros(num_requests), adapter, num_prompt, num_output)


def named_trace(
    name: str,
    num_adapters: int,
    rate: float,
    num_requests: int,
    *,
    lengths: tuple[int, int],
    max_total: int,
    seed: int,
) -> Trace:
    """slora-ALPHA, punica-POPULARITY or zipf-EXPONENT, num_requests of them at `rate` a second.

    S-LoRA's seed is 42 + seed, so seed 0 is the published draw. Punica's adapters beyond
    num_adapters begin again at the first. ValueError for another name.
    """
    kind, _, detail = name.partition("-")
    if kind == "slora":
        seconds = (num_requests + 0.5) / rate  # of which the generator takes the whole requests
        return slora(
            num_adapters, float(detail), rate, 1.0, seconds, lengths=lengths, seed=42 + seed
        )
    if kind == "zipf":
        trace = zipf(num_adapters, float(detail), num_requests, lengths=lengths, seed=seed)
        return trace.arriving(rate, seed)
    for popularity in POPULARITIES:
        if name == f"punica-{popularity}":
            mix = punica(popularity, num_requests, max_total=max_total, seed=PUNICA_SEED + seed)
            wrapped = dataclasses.replace(mix, adapter=mix.adapter % num_adapters)
            return wrapped.arriving(rate, seed)
    known = ", ".join(f"punica-{popularity}" for popularity in POPULARITIES)
    raise ValueError(f"{name!r} is no workload: use slora-ALPHA, zipf-EXPONENT, {known}")


class RandomPrompts:
    """Prompts of random token ids, none drawn twice: no prefix cache can help.

    From the first nine tenths of the vocabulary; added tokens and padding come at its end.
    """

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._num_ids = vocab_size * 9 // 10
        self._generator = np.random.default_rng(seed)

    def draw(self, lengths: Sequence[int] | Ints) -> list[list[int]]:
        """A new prompt of each length, in tokens."""
        return [self._generator.integers(0, self._num_ids, n).tolist() for n in lengths]


def adapter_ranks(
    num_adapters: int, ranks: Sequence[int], shuffle_seed: int | None = None
) -> list[int]:
    """The rank of each adapter: `ranks` in turn, as S-LoRA has it, or that list shuffled.

    In turn, the most popular adapter always has the first rank: popularity and rank are confounded
    at index 0, and shuffling parts them.
    """
    cycled = [ranks[i % len(ranks)] for i in range(num_adapters)]
    if shuffle_seed is None:
        return cycled
    order = np.random.default_rng(shuffle_seed).permutation(num_adapters)
    return [cycled[i] for i in order]
