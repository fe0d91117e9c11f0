"""One generation in progress: its tokens, what of them is computed, where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from server.memory.prefix_index import BlockKeys

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from server.engine.request import AdapterImage, Submit


BASE_TENANT = "base"
"""Whom requests without adapter count for, unless they name a tenant."""


class Status(Enum):
    """Where a sequence stands; it may go back from RUNNING to WAITING (preempted)."""

    WAITING = "waiting"  # has no blocks, pins no adapter
    RUNNING = "running"  # admitted: has blocks and a slot
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Changed only by the scheduler's submit, plan, commit and cancel.

    Invariant: 0 <= num_computed < num_tokens until it is finished; slot is set while RUNNING.
    """

    request: Submit
    arrival: int  # place in the order of submission
    token_ids: list[int] = field(init=False)  # the prompt, then what was generated
    tenant: str = field(init=False)  # whose service it counts as
    members: tuple[AdapterImage, ...] = field(init=False)  # which have to be resident to run it
    digests: tuple[str | None, ...] = field(init=False)  # wanted_digest, and those of members
    num_computed: int = 0  # leading tokens whose keys and values are in the KV cache
    num_found: int = 0  # of these, found in the prefix cache when it was admitted last
    num_cached: int | None = None  # num_found of its first admission; None = it had none
    status: Status = Status.WAITING
    slot: int | None = None  # -1 = base model; None = not admitted
    adapter_digest: str | None = None  # of the slot that computed its tokens
    num_preemptions: int = 0
    _keys: BlockKeys = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        image = self.request.adapter
        self.members = image.members if image is not None else ()
        parts = self.members if image is not None and image.parts else ()
        self.digests = (self.wanted_digest, *(part.digest for part in parts))
        tenant = self.request.tenant
        self.tenant = self.wanted_digest or BASE_TENANT if tenant is None else tenant
        self._keys = BlockKeys(self.request.cache_salt, self.wanted_digest)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def wanted_digest(self) -> str | None:
        """Of the adapter or combination that the request names; None = base model."""
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens, a stop token left out."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_to_compute(self) -> int:
        """Known tokens that it computes, or has computed, since it was admitted."""
        return len(self.token_ids) - self.num_found

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that have no keys and values yet; 1 = decode, more = prefill."""
        return len(self.token_ids) - self.num_computed

    def block_keys(self, block_size: int) -> Seq[bytes]:
        """Keys of its full blocks so far, by which the KV cache knows their content."""
        return self._keys.of(self.token_ids, block_size)

    def check(self) -> None:
        """Recompute the invariant; AssertionError when it does not hold."""
        prompt = list(self.request.prompt_token_ids)
        assert self.token_ids[: len(prompt)] == prompt, "the prompt was changed"
        assert (self.slot is not None) == (self.status is Status.RUNNING)
        if self.status is Status.WAITING:
            assert self.num_computed == 0
        elif self.status is Status.RUNNING:
            assert 0 <= self.num_computed < self.num_tokens
