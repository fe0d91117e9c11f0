"""What passes between the scheduler and a step: the plan, and the tokens that it sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from server.engine.request import TokenLogprobs
    from server.engine.sequence import Sequence


class PlannedSequence(NamedTuple):
    """The share of one sequence in a step: its tokens start .. start + num_tokens."""

    sequence: Sequence
    start: int
    num_tokens: int
    slot: int  # -1 = base model
    samples: bool  # the last known token is among them: the next one is sampled


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, ordered by slot, base model first."""

    items: tuple[PlannedSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_samples(self) -> int:
        """Items of which the next token is sampled."""
        return sum(item.samples for item in self.items)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one sequence; log-probabilities where the request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None
