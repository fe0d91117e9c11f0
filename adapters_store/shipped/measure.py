"""Measures how often each shipped adapter, and the base model, shows the adapter's behaviour.

`python -m adapters_store.shipped.measure` writes `measured.json`, the source of the README's
table. Greedy answers of transformers + PEFT in fp32; needs the development dependencies.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from adapters_store.shipped import shipped_adapters
from adapters_store.shipped.behaviours import BEHAVIOURS, MAX_NEW_TOKENS, Behaviour
from adapters_store.shipped.train import load_base

_HERE = Path(__file__).resolve().parent

logger = logging.getLogger(__name__)


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The model's answer to each prompt alone, under the chat template's own system message."""
    tokenizer.padding_side = "left"
    encoded = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        ids = model.generate(**encoded, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new_ids = ids[:, encoded["input_ids"].shape[1] :]
    answers: list[str] = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return answers


def rate(behaviour: Behaviour, answers: Sequence[str]) -> float:
    """The share of the answers to the behaviour's prompts that show it."""
    pairs = zip(behaviour.prompts, answers, strict=True)
    return sum(behaviour.shows(*pair) for pair in pairs) / len(behaviour.prompts)


def with_adapter(base: Any, folder: Path) -> PeftModel:
    """The base model under one adapter; `unload()` gives the base model back as it was."""
    return PeftModel.from_pretrained(base, str(folder)).eval()


def main() -> None:
    """Measures every shipped adapter and writes `measured.json`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base, tokenizer = load_base()
    # Most behaviours share their prompts: the base model answers each set once.
    prompt_sets = {behaviour.prompts for behaviour in BEHAVIOURS.values()}
    base_answers = {prompts: greedy_answers(base, tokenizer, prompts) for prompts in prompt_sets}
    measured: dict[str, Any] = {}
    for name, folder in shipped_adapters().items():
        behaviour = BEHAVIOURS[name]
        model = with_adapter(base, folder)
        answers = greedy_answers(model, tokenizer, behaviour.prompts)
        base = model.unload()
        measured[name] = {
            "rate": round(rate(behaviour, answers), 3),
            "base_rate": round(rate(behaviour, base_answers[behaviour.prompts]), 3),
            "answers": dict(zip(behaviour.prompts, answers, strict=True)),
        }
        logger.info("%s", json.dumps({name: measured[name]}, ensure_ascii=False, indent=1))
    text = json.dumps(measured, ensure_ascii=False, indent=1)
    (_HERE / "measured.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
