"""What the quality bench reads: the repository's own papers, and conversations with adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters_store.shipped import data
from bench.record import ROOT

PAPERS = ("README.md", "ARCHITECTURE.md", "LICENSE", "docs/*.md")
WINDOW = 512
"""Tokens of a paper that are read in one go; the next ones begin with an empty context."""


@dataclass(frozen=True)
class Sample:
    """Token ids, of which those from `first` on are predicted; first is at least 1."""

    token_ids: tuple[int, ...]
    first: int = 1


def papers(tokenizer: Any, window: int = WINDOW) -> list[Sample]:
    """Every paper, cut into windows; a rest of a few tokens is left out."""
    samples = []
    for pattern in PAPERS:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            starts = range(0, max(1, len(ids) - 1), window)
            samples += [Sample(tuple(ids[start : start + window])) for start in starts]
    return [sample for sample in samples if len(sample.token_ids) > 1]


def conversations(tokenizer: Any, name: str | None) -> list[Sample]:
    """Conversations in the style of a shipped adapter, None for plain ones; answers are predicted.

    For an adapter these are its training examples, then its answers to held-out prompts.
    """
    if name is None:
        examples = [data.Example(q.prompt, q.answer) for q in data.questions()]
    else:
        measured = json.loads((ROOT / "adapters_store/shipped/measured.json").read_bytes())
        held_out = measured[name]["answers"].items()
        examples = [*data.training_examples(name), *(data.Example(*pair) for pair in held_out)]
    return [_conversation(tokenizer, example) for example in examples]


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """A user's turn as the model's chat template has it, up to where the answer begins.

    A model without a template gets the prompt and a line's end.
    """
    if tokenizer.chat_template is None:
        text = f"{prompt}\n"
    else:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def answer_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer up to its end token, if it has one."""
    ids = list(token_ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _conversation(tokenizer: Any, example: data.Example) -> Sample:
    before = prompt_ids(tokenizer, example.prompt, example.system)
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    return Sample((*before, *answer, tokenizer.eos_token_id), len(before))
