"""The messages between the API process and the engine; frozen, and all that crosses.

The API process sends Submit, Cancel, Preload and Drop; the engine sends Settled and Started, or
Refused, and then TokenEvent, Finished, Dropped and Load. Every Submit is answered by any number of
TokenEvents and exactly one Finished.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from adapters_store.layout import BaseLayout as BaseLayout
from server.memory.residency import AdapterImage as AdapterImage
from server.memory.residency import AdapterPart as AdapterPart
from server.memory.residency import ResidentAdapter as ResidentAdapter
from server.memory.residency import combination as combination

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base of everything that crosses between the processes."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen; ranges are checked before it is built."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # always set: a random one where the client gave none
    stop_token_ids: tuple[int, ...] = ()  # end of sequence among them, unless ignored
    num_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen token only


class Submit(Message, frozen=True):
    """Generate from `prompt_token_ids` with the base model, an adapter or a combination."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    adapter: AdapterImage | None = None
    tenant: str | None = None  # whose service it counts as; None = its adapter's
    weight: float = 1.0  # the tenant's share of the service, beside others'; above 0
    priority: int = 0  # lower first
    queue_timeout: float | None = None  # seconds that it may wait for admission; None = any
    cache_salt: str = ""  # cached prefixes are shared only by requests that have the same


class Cancel(Message, frozen=True):
    """End a request; its Finished says `cancelled`. Unknown or ended ids are ignored."""

    request_id: str


class Preload(Message, frozen=True):
    """Make an adapter resident when there is room without evicting; nothing is answered."""

    adapter: AdapterImage


class Drop(Message, frozen=True):
    """Free an adapter once its running and waiting requests have ended; answered by Dropped."""

    digest: str
    abort: bool = False  # cancel its requests instead of letting them end


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities of one position, before temperature and truncation."""

    chosen: float
    top_ids: tuple[int, ...] = ()  # most probable first
    top_logprobs: tuple[float, ...] = ()


class TokenEvent(Message, frozen=True):
    """New tokens of one request; the stop token that ends a request is not among them."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each token, if asked for
    num_cached_tokens: int = 0  # as in Finished
    adapter_digest: str | None = None  # read from the slot that computed them; None = base


class Finished(Message, frozen=True):
    """The one final event of a request."""

    request_id: str
    reason: FinishReason
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0  # the stop token included
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache when it was admitted
    adapter_digest: str | None = None  # that computed the tokens; None = base, or none computed
    error: str | None = None  # message for the client, with reason "error"
    error_code: str | None = None  # a code of the table in `server.errors`
    retry_after: int | None = None  # seconds after which another try may do better, if known


class Dropped(Message, frozen=True):
    """An adapter is off the device; 0 bytes when it was not resident."""

    digest: str
    freed_bytes: int


class Settled(Message, frozen=True):
    """What the engine will be, known before it reads a weight; its first message."""

    model_name: str  # the model's own
    model_path: str  # a directory in Hugging Face's form, or a .gguf file
    eos_token_ids: tuple[int, ...]  # of the model's config
    device: str
    dtype: str
    max_context: int
    num_pages: int | None  # of the pool; None: known when the weights are there
    layout: BaseLayout  # what the store packs adapters for


class Refused(Message, frozen=True):
    """The engine cannot serve this model with these settings; its last message."""

    error: str


class Started(Message, frozen=True):
    """The engine is able to serve."""

    num_pages: int
    page_bytes: int
    num_slots: int
    max_context: int  # longest prompt + completion that the pool and model allow


class Load(Message, frozen=True):
    """The engine's report, sent after steps at most every 200 ms and when it becomes idle."""

    num_running: int
    num_waiting: int
    num_free_pages: int
    num_kv_pages: int  # of sequences that run
    num_adapter_pages: int
    num_steps: int
    num_preemptions: int
    num_adapter_loads: int
    num_adapter_evictions: int
    num_prompt_tokens: int  # processed since the start
    num_generated_tokens: int
    num_host_loads: int = 0  # that found their image in host memory
    num_cancelled_loads: int = 0  # that nobody waited for any more
    num_cached_pages: int = 0  # of prefixes that no running sequence has
    num_cached_tokens: int = 0  # of prompts that were admitted, found in the prefix cache
    adapters: tuple[ResidentAdapter, ...] = ()


ToEngine = Submit | Cancel | Preload | Drop
FromEngine = Settled | Refused | Started | TokenEvent | Finished | Dropped | Load
