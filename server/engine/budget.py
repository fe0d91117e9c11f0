"""The token budget of a step: what prompts get beside decodes, and what a chunk of one costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.engine.plan import PlannedSequence

LEAST_SHARE = 12
"""Beside decodes, long prompts get at least one part in this many of a step."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Counts tokens of short context; a prompt's token costs more behind a long one.

    attention_context: tokens of context whose attention takes a token as long as all the rest of
    the model; None: all tokens cost alike.
    """

    num_tokens: int
    attention_context: int | None = None

    def piece(self, num_decodes: int, num_long: int) -> int:
        """Most that a step spends on one of `num_long` long prompts beside decodes; at least 1.

        A prompt that one step can hold is computed at once, since no stream waits for it longer
        than a step. One that takes many steps shares each with the decoding sequences, as if it
        were one of them.
        """
        share = max(self.num_tokens // (1 + num_decodes), self.num_tokens // LEAST_SHARE)
        return max(1, share // max(1, num_long))

    def is_long(self, num_tokens: int) -> bool:
        """Whether a prompt takes more than one step."""
        return num_tokens > self.num_tokens

    def affordable(self, context: int, budget: int) -> int:
        """Tokens of a prompt that `budget` pays for behind `context` others; at least 1."""
        if self.attention_context is None:
            return budget
        return max(1, budget * self.attention_context // (self.attention_context + context))

    def cost(self, item: PlannedSequence) -> int:
        """What an item takes of a step: a decode 1, a chunk at least its tokens."""
        if item.num_tokens == 1 or self.attention_context is None:
            return item.num_tokens
        return item.num_tokens * (self.attention_context + item.start) // self.attention_context
