"""Holds the engine's answers against dense fp32 arithmetic in transformers, W + 2 BA for W."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from bench.engine_session import EngineSession
from server.engine.request import AdapterImage
from server.model.source import ModelSource

NUM_CHECKED = 3
NUM_PROMPT, NUM_OUTPUT = 32, 8
MAX_DISTANCE = 0.2
"""Mean absolute difference of log-probabilities that bf16 may make."""


async def check_against_dense(
    session: EngineSession, images: Sequence[AdapterImage], directory: Path
) -> dict[str, float]:
    """Mean distance of answers' log-probabilities from dense arithmetic, and from the base model's.

    images[i] is of the adapter in directory/adapter-i. Raises RuntimeError where answers are off,
    or nearer to the base model than to their adapter.
    """
    transformers.utils.logging.disable_progress_bar()
    model = _load(session.spec.source)
    prompts = session.prompts(NUM_CHECKED, NUM_PROMPT)
    to_dense, to_base = [], []
    for i, image in enumerate(images[:NUM_CHECKED]):
        events = await session.answer(prompts[i], image, NUM_OUTPUT, num_logprobs=0)
        tokens = [token for event in events for token in event.token_ids]
        ours = [entry.chosen for event in events for entry in event.logprobs or ()]
        to_base.append(_distance(ours, _score(model, prompts[i], tokens)))
        tensors = load_file(directory / f"adapter-{i}" / "adapter_model.safetensors")
        _merge(model, tensors, 2.0)
        to_dense.append(_distance(ours, _score(model, prompts[i], tokens)))
        _merge(model, tensors, -2.0)
    dense, base = statistics.fmean(to_dense), statistics.fmean(to_base)
    if not (dense <= MAX_DISTANCE and 2 * dense <= base):
        raise RuntimeError(
            f"log-probabilities are {dense:.3f} from dense arithmetic and {base:.3f} from the base "
            f"model's: the first may be {MAX_DISTANCE} and half of the second"
        )
    return {"distance_to_dense": dense, "distance_to_base": base}


def _load(source: ModelSource) -> Any:
    if not source.is_gguf:
        model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
        return model.eval()
    config = transformers.GgufConfig(gguf_file=source.path.name, dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        source.path.parent,
        gguf_file=source.path.name,
        dtype=torch.float32,
        quantization_config=config,
    ).eval()


def _merge(model: Any, tensors: dict[str, torch.Tensor], scaling: float) -> None:
    """W += scaling · B A for every module of the adapter."""
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight.data += scaling * (b.float() @ a.float())


@torch.inference_mode()
def _score(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of the tokens after the prompt."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
    return [float(x) for x in chosen[:, 0]]


def _distance(left: Sequence[float], right: Sequence[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(left, right, strict=True))
