"""The bodies that clients send: every parameter, its type and its range."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_SEQUENCES = 128
"""Most completions that one request may ask for: prompts times n."""
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SALT_CHARACTERS = 256
MAX_USER_CHARACTERS = 256
MAX_PRIORITY = 100
"""Of either sign."""
MAX_MEMBERS = 16
"""Most adapters of a combination."""
MAX_WEIGHT = 100
"""Of either sign; what is far above 1 is a mistake, or noise."""

IGNORED = frozenset(
    {
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""OpenAI's parameters that are taken and have no effect here: none changes the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's parameters that cannot be honoured, with the values (beside null) that ask nothing."""


class Wire(BaseModel):
    """A body or a part of one: no unknown members, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _joined_parts(value: Any) -> Any:
    """Text parts become one text, a line each; anything that is no text part is refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "content_part", 'only parts {"type": "text", "text": "…"} are supported'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(value: Any) -> Any:
    """One prompt or several become several; a prompt is a text or a list of token ids."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(x, str) for x in value):
        return value
    if isinstance(value, list) and value and all(_is_token_ids(x) for x in value):
        return value
    raise PydanticCustomError(
        "prompt", "it must be a string, a list of strings, a list of token ids or a list of those"
    )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopList = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
EmptyList = Annotated[list[Any], Field(max_length=0)]


class StreamOptions(Wire):
    """What a stream gives besides its pieces."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # taken, without effect


class WeightedAdapter(Wire):
    """A member of a combination."""

    id: str  # an adapter reference, as in `adapter_id`
    weight: Weight = 1.0


class MergedAdapters(Wire):
    """A combination as LoRAX takes it. `linear` is the weighted sum, and all that is served."""

    ids: list[str] = Field(min_length=1, max_length=MAX_MEMBERS)
    weights: list[Weight] | None = None  # all 1
    merge_strategy: Literal["linear"] | None = None
    density: float | None = None  # this and the next: of other strategies
    majority_sign_method: Literal["total", "frequency"] | None = None


class GenerationBody(Wire):
    """The parameters that chat and plain completions share; null stands for the default."""

    model: str | None = None
    adapter_id: str | None = None
    scale: Weight | None = None  # of that adapter
    adapters: list[WeightedAdapter] | None = Field(None, min_length=1, max_length=MAX_MEMBERS)
    merged_adapters: MergedAdapters | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)  # 0 and -1: all
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[StopList | None, BeforeValidator(_as_list)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: Annotated[str, StringConstraints(max_length=MAX_USER_CHARACTERS)] | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)  # lower first
    queue_timeout: float | None = Field(None, gt=0)  # seconds
    cache_salt: Annotated[str, StringConstraints(max_length=MAX_SALT_CHARACTERS)] | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends in a chunk with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatMessage(Wire):
    """One turn; what answers carry beside their text may come back, if it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None  # taken, without effect
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: EmptyList | None = None
    tool_calls: EmptyList | None = None

    def for_template(self) -> dict[str, str]:
        """The turn as chat templates read it; developer is the newer name of system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)] = Field(
        max_length=MAX_SEQUENCES
    )
    logprobs: int | None = Field(None, ge=0, le=5)
