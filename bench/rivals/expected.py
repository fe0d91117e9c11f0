"""What base and adapters answer by dense fp32 arithmetic, and whether a rival answers the same.

A rival is timed only after it has given the expected first token to one request for the base model
and one for each adapter, all in one batch. The prompts are chosen so that a wrong adapter, none,
or a wrong scale gives another token: the base model's differs, and the second best is far away.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rivals.environments import RivalError
from bench.rivals.model_files import (
    MODEL,
    MODELS,
    NUM_ADAPTERS,
    adapter_directory,
    write_once,
)
from bench.rivals.workload import prompt_token_ids

if TYPE_CHECKING:
    import torch

EXPECTED = MODELS / "expected.json"
NUM_CANDIDATES, NUM_PROMPT = 48, 12
MIN_MARGIN = 0.5
"""In logits: below it, rounding to bf16 may choose another token."""


@dataclass(frozen=True)
class Expected:
    """The first greedy token after a prompt, as text, and its margin in logits."""

    adapter: int | None
    prompt: list[int]
    text: str
    margin: float


def write_expected() -> None:
    """Compute the expected answers unless they are there; takes minutes."""
    write_once(EXPECTED, _write_expected)


def read_expected(num_adapters: int) -> list[Expected]:
    """The clear answers of the base model and of the first `num_adapters` adapters."""
    entries = [Expected(**entry) for entry in json.loads(EXPECTED.read_text())]
    return [
        entry
        for entry in entries
        if entry.margin >= MIN_MARGIN and (entry.adapter is None or entry.adapter < num_adapters)
    ]


def check_answers(rival: str, expected: list[Expected], answers: list[str]) -> None:
    """RivalError that lists the answers which are not as expected."""
    wrong = [
        f"{'the base model' if entry.adapter is None else f'adapter {entry.adapter}'} "
        f"answers {answer!r} instead of {entry.text!r}"
        for entry, answer in zip(expected, answers, strict=True)
        if answer.strip() != entry.text.strip()
    ]
    if wrong:
        raise RivalError(f"{rival} is not timed, because it is wrong: {'; '.join(wrong)}")


def _write_expected(path: Path) -> None:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    prompts = prompt_token_ids(NUM_CANDIDATES, NUM_PROMPT, seed=1)
    base = _last_logits(model, prompts)
    entries, other = [], base
    for index in range(NUM_ADAPTERS):
        _add_adapter(model, adapter_directory(index), 1.0)
        other = _last_logits(model, prompts)
        _add_adapter(model, adapter_directory(index), -1.0)
        entries.append(_clearest(index, prompts, other, base, tokenizer))
    entries.append(_clearest(None, prompts, base, other, tokenizer))
    path.write_text(json.dumps([asdict(entry) for entry in entries]))


def _last_logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Logits after each prompt: [P, V] fp32."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor(prompts), logits_to_keep=1).logits[:, 0]
        return logits


def _clearest(
    adapter: int | None,
    prompts: list[list[int]],
    logits: torch.Tensor,  # [P, V], of the one that answers
    others: torch.Tensor,  # [P, V], of one that must not have answered
    tokenizer: Any,
) -> Expected:
    best = logits.topk(2)
    texts = tokenizer.batch_decode(best.indices[:, :1])
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    differs = (best.indices[:, 0] != others.argmax(-1)).tolist()
    found = [
        Expected(adapter, prompt, text, round(margin, 3))
        for prompt, text, margin, is_other in zip(prompts, texts, margins, differs, strict=True)
        if is_other and text.strip().isascii() and text.strip().isprintable() and text.strip()
    ]
    return max(found, key=lambda entry: entry.margin)


def _add_adapter(model: Any, directory: Path, sign: float) -> None:
    """W += sign · alpha/r · B A."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    scaling = sign * config["lora_alpha"] / config["r"]
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight.data += scaling * (b.float() @ a.float())
