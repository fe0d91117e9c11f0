"""How requests end: what is said of one that can not be served, and the one final event of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from server.engine.request import Finished

if TYPE_CHECKING:
    from server.engine.request import FinishReason
    from server.engine.sequence import Sequence
    from server.memory.adapter_pool import AdapterPool
    from server.memory.kv_cache import KVCache


class Fault(NamedTuple):
    """Why a request ends without what it asked for."""

    error: str
    error_code: str  # of the table in `server.errors`
    retry_after: int | None = None  # seconds; None = not known, or in vain


def final_event(
    sequence: Sequence, reason: FinishReason, fault: Fault | None = None, *, num_unseen: int = 0
) -> Finished:
    """The Finished of a sequence; `num_unseen` counts a stop token."""
    return Finished(
        request_id=sequence.request_id,
        reason=reason,
        num_prompt_tokens=sequence.num_prompt,
        num_completion_tokens=sequence.num_generated + num_unseen,
        num_cached_tokens=sequence.num_cached or 0,
        adapter_digest=sequence.adapter_digest,
        error=fault.error if fault else None,
        error_code=fault.error_code if fault else None,
        retry_after=fault.retry_after if fault else None,
    )


def unservable(
    sequence: Sequence, max_context: int, kv_cache: KVCache, adapters: AdapterPool
) -> Fault | None:
    """Why a new request could never be served; None if it can."""
    if sequence.num_prompt == 0:
        return Fault("the prompt has 0 tokens: send at least 1", "invalid_request")
    if sequence.num_prompt >= max_context:
        text = (
            f"the prompt has {sequence.num_prompt} tokens, the context holds {max_context} with "
            "at least 1 of the completion: shorten the prompt"
        )
        return Fault(text, "context_length_exceeded")
    if kv_cache.blocks_for(sequence.num_prompt) > kv_cache.max_blocks:
        return too_large(sequence, kv_cache)
    image = sequence.request.adapter
    why = None if image is None else adapters.misfit(image)
    return None if why is None else Fault(why, "invalid_value")


def too_large(sequence: Sequence, kv_cache: KVCache) -> Fault:
    """What is said of a sequence that the whole pool could not hold."""
    text = (
        f"{sequence.num_tokens} tokens take {kv_cache.blocks_for(sequence.num_tokens)} pages "
        f"beside those of the adapter, and the pool has {kv_cache.max_blocks}: shorten the prompt "
        "or the completion, or make the pool larger (pool_bytes)"
    )
    return Fault(text, "context_length_exceeded")
