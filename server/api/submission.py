"""From a body's parameters to what the engine is asked: lengths, seeds, stop tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from server.api.addressing import Addressee
from server.api.generation import Generation
from server.api.state import AppState
from server.api.wire import MAX_SEQUENCES, GenerationBody
from server.engine.request import Sampling, Submit
from server.errors import ContextTooLong, InvalidRequest


@dataclass(frozen=True, slots=True)
class Length:
    """How many tokens a client wants, the parameter that says so, and what it gets otherwise."""

    wanted: int | None
    param: str
    default: int | None = None  # None: the rest of the context


def new_generation(
    state: AppState,
    kind: str,
    body: GenerationBody,
    addressee: Addressee,
    prompts: Sequence[Sequence[int]],
    length: Length,
    num_logprobs: int | None,
) -> Generation:
    """A generation of `n` choices for each prompt of token ids; `kind` begins its id.

    Raises ContextTooLong, InvalidRequest, or EngineUnavailable while the engine starts.
    """
    num_choices = body.n or 1
    if len(prompts) * num_choices > MAX_SEQUENCES:
        raise InvalidRequest(
            f"{len(prompts)} prompts with 'n' = {num_choices} are {len(prompts) * num_choices} "
            f"completions, above the limit of {MAX_SEQUENCES}: send several requests",
            param="n",
        )
    completion_id = f"{kind}-{secrets.token_hex(16)}"
    seed = secrets.randbits(63) if body.seed is None else body.seed
    tenant, weight = _tenant(state, body, addressee)
    queue_timeout = _queue_timeout(state.settings.queue_timeout, body.queue_timeout)
    submits: list[Submit] = []
    for prompt in prompts:
        max_tokens = _max_tokens(state.running_context(), len(prompt), length)
        for i in range(num_choices):
            submits.append(
                Submit(
                    request_id=f"{completion_id}-{len(submits)}",
                    prompt_token_ids=tuple(prompt),
                    sampling=_sampling(state, body, max_tokens, seed + i, num_logprobs),
                    adapter=addressee.image,
                    cache_salt=body.cache_salt or "",
                    tenant=tenant,
                    weight=weight,
                    priority=body.priority or 0,
                    queue_timeout=queue_timeout,
                )
            )
    num_prompt_tokens = sum(len(prompt) for prompt in prompts)
    stops = body.stop or ()
    return Generation(
        state, completion_id, addressee, submits, num_choices, stops, num_prompt_tokens
    )


def _max_tokens(max_context: int, num_prompt: int, length: Length) -> int:
    room = max_context - num_prompt
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {num_prompt} tokens and the context holds {max_context}, the first "
            "token of the answer included: shorten the prompt",
            param="messages" if length.default is None else "prompt",
        )
    if length.wanted is None:
        return room if length.default is None else min(length.default, room)
    if length.wanted > room:
        raise ContextTooLong(
            f"the prompt has {num_prompt} tokens and '{length.param}' asks for {length.wanted} "
            f"more, but the context holds {max_context}: lower '{length.param}' to {room} or less",
            param=length.param,
        )
    return length.wanted


def _tenant(
    state: AppState, body: GenerationBody, addressee: Addressee
) -> tuple[str | None, float]:
    """Whose service a request counts as, None for its adapter's, and the weight of its share."""
    settings = state.settings
    if settings.fairness == "none":
        return "", 1.0
    if settings.fairness == "user" and body.user is not None:
        return f"user:{body.user}", settings.tenant_weights.get(body.user, 1.0)
    return None, settings.tenant_weights.get(addressee.model_name, 1.0)


def _queue_timeout(longest: float | None, wanted: float | None) -> float | None:
    """Seconds that a request may wait: the setting's, or less if it asks for less."""
    if wanted is None or longest is None:
        return longest if wanted is None else wanted
    if wanted > longest:
        raise InvalidRequest(
            f"'queue_timeout' = {wanted:g} is above this server's limit of {longest:g} s: lower "
            "it, or leave it out",
            param="queue_timeout",
        )
    return float(wanted)


def _sampling(
    state: AppState, body: GenerationBody, max_tokens: int, seed: int, num_logprobs: int | None
) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        min_p=0.0 if body.min_p is None else float(body.min_p),
        seed=seed % 2**63,
        stop_token_ids=() if body.ignore_eos else state.tokenizer.eos_token_ids,
        num_logprobs=num_logprobs,
    )
