"""What does `--quantization int8` cost in quality?

The same texts are read by the decoder in float32, in bfloat16 and with int8 weights, each told the
true tokens (teacher forcing): the repository's papers by the base model; plain answers by the base
model and answers in its own style by each shipped adapter, both in the chat template. Of what the
three say of every next token:

perplexity  exp of the mean surprise at the true token
KL          mean divergence of the distribution from that of float32, in nats
top-1       share of tokens at which two have the same favourite; bfloat16 beside float32 tells
            how much of int8's disagreement is the noise that bfloat16 has anyway

and how many of the adapters' greedy answers to held-out prompts show the stated behaviour. The
limits below were set before the first measurement. No other device than a CPU serves int8.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters_store.shipped import shipped_adapters
from adapters_store.shipped.behaviours import BEHAVIOURS, MAX_NEW_TOKENS
from bench.bare_model import BareModel
from bench.quality_texts import Sample, answer_text, conversations, papers, prompt_ids
from bench.random_adapters import write_adapter
from bench.record import add_model_flag, arguments, engine_settings, finish
from server.config import EMBEDDED_MODEL, Settings
from server.engine.spec import engine_spec
from server.model.tokenizer import load_tokenizer

TRUTH, USUAL, QUANTISED = "float32", "bfloat16", "int8"
VARIANTS = {
    TRUTH: {"dtype": "float32"},
    USUAL: {"dtype": "bfloat16"},
    QUANTISED: {"dtype": "bfloat16", "quantization": "int8"},
}
PAIRS = ((USUAL, TRUTH), (QUANTISED, TRUTH), (QUANTISED, USUAL))
POOL_BYTES = 1 << 28

MAX_PERPLEXITY_RATIO = 1.01
"""int8's perplexity over bfloat16's, on every kind of text."""
MAX_TOP1_LOSS = 0.01
"""By how much int8 may agree less with bfloat16 than bfloat16 does with float32."""


class Reading(NamedTuple):
    """What one variant says of n tokens."""

    surprise: Tensor  # [n] fp32: minus the log-probability of the true token
    divergence: Tensor  # [n] fp32: KL(float32 || variant), nats
    favourite: Tensor  # [n] int64: the likeliest token


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    add_model_flag(parser)
    parser.add_argument("--samples", type=int, default=100, help="of each kind of text at most")
    options = parser.parse_args()
    if options.device == "cuda" or options.dtype != "auto":
        parser.error("int8 runs on a CPU, and the dtypes are compared: leave --device and --dtype")
    run(options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Read everything; returns the record."""
    options.device = "cpu"
    if options.quick:
        options.samples = 2
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings = engine_settings(
            options, directory, pool_bytes=POOL_BYTES, max_adapters=len(BEHAVIOURS)
        )
        adapters = adapters_for(settings, options, directory)
        models = load_variants(settings, adapters, directory)
        source = engine_spec(settings).source
        tokenizer = load_tokenizer(source)
        rows = [
            row(models, kind, name, spaced(samples, options.samples))
            for kind, name, samples in texts(tokenizer, adapters)
        ]
        behaviours = [
            behaviour(models, tokenizer, name, options.samples) for name in sorted(adapters)
        ]
    numbers: dict[str, Any] = {"model": source.name, "rows": rows, "behaviours": behaviours}
    if not options.quick:
        numbers["bars"] = bars(rows, behaviours)
    print(table(numbers))
    return finish("quality", "cpu", options, numbers)


def adapters_for(
    settings: Settings, options: argparse.Namespace, directory: Path
) -> dict[str, Path]:
    """The shipped adapters of the embedded model; with --quick, random ones in their place."""
    if settings.model == EMBEDDED_MODEL:
        return shipped_adapters()
    if not options.quick:
        return {}
    layout = engine_spec(settings).layout
    return {
        name: write_adapter(directory / name, layout, 8, seed)
        for seed, name in enumerate(("json", "shout"))
    }


def load_variants(
    settings: Settings, adapters: Mapping[str, Path], directory: Path
) -> dict[str, BareModel]:
    """Every variant with all adapters; ModelError where the machine serves no int8."""
    specs = {
        name: engine_spec(settings.model_copy(update=changes)) for name, changes in VARIANTS.items()
    }
    return {
        name: BareModel(spec, adapters, directory / f"data-{name}") for name, spec in specs.items()
    }


def texts(
    tokenizer: Any, adapters: Mapping[str, Path]
) -> list[tuple[str, str | None, list[Sample]]]:
    """Kind of text, who reads it (None: the base model), and its samples."""
    found: list[tuple[str, str | None, list[Sample]]] = [("papers", None, papers(tokenizer))]
    return found + [("chat", name, conversations(tokenizer, name)) for name in (None, *adapters)]


def spaced(samples: Sequence[Sample], num_samples: int) -> Sequence[Sample]:
    """num_samples of them at most, at even distances."""
    return samples[:: max(1, math.ceil(len(samples) / num_samples))]


def row(
    models: Mapping[str, BareModel], kind: str, adapter: str | None, samples: Sequence[Sample]
) -> dict[str, Any]:
    """The figures of one kind of text."""
    parts = []
    for sample in samples:
        ids, first = sample.token_ids, sample.first
        said = {name: model.logits(ids, adapter, first) for name, model in models.items()}
        parts.append(read(said, torch.tensor(ids[first:])))
    readings = {
        name: Reading(
            *(torch.cat(column) for column in zip(*(p[name] for p in parts), strict=True))
        )
        for name in models
    }
    return {"text": kind, "adapter": adapter, "num_samples": len(samples), **figures(readings)}


def read(said: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Reading]:
    """From each variant's logits [n, vocab] of tokens [n] to its readings."""
    logprobs = {name: logits.log_softmax(-1) for name, logits in said.items()}
    truth = logprobs[TRUTH]
    return {
        name: Reading(
            -found.gather(1, tokens[:, None])[:, 0],
            (truth.exp() * (truth - found)).sum(-1),
            found.argmax(-1),
        )
        for name, found in logprobs.items()
    }


def figures(readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Perplexity of each variant, KL of the two that round, top-1 agreement of each pair."""
    perplexity = {name: math.exp(r.surprise.double().mean()) for name, r in readings.items()}
    return {
        "num_tokens": len(readings[TRUTH].surprise),
        "perplexity": perplexity,
        "perplexity_ratio": perplexity[QUANTISED] / perplexity[USUAL],
        "kl_to_float32": {
            name: float(readings[name].divergence.double().mean()) for name in (USUAL, QUANTISED)
        },
        "top1_agreement": {
            f"{a}_{b}": float((readings[a].favourite == readings[b].favourite).double().mean())
            for a, b in PAIRS
        },
    }


def behaviour(
    models: Mapping[str, BareModel], tokenizer: Any, name: str, num_prompts: int
) -> dict[str, Any]:
    """Share of an adapter's greedy answers to held-out prompts that show what it is to show."""
    stated = BEHAVIOURS[name]
    prompts = stated.prompts[:num_prompts]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    answers = {
        variant: [
            answer_text(tokenizer, answer) for answer in model.answers(ids, name, MAX_NEW_TOKENS)
        ]
        for variant, model in models.items()
    }
    rates = {
        variant: sum(map(stated.shows, prompts, found)) / len(prompts)
        for variant, found in answers.items()
    }
    same = sum(a == b for a, b in zip(answers[QUANTISED], answers[USUAL], strict=True))
    return {
        "adapter": name,
        "num_prompts": len(prompts),
        "rate": rates,
        "min_rate": stated.min_rate,
        "int8_answers_equal_to_bfloat16": same / len(prompts),
    }


def bars(
    rows: Sequence[dict[str, Any]], behaviours: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The stated limits on the worst row and the worst adapter: value, limit, verdict."""
    ratio = max(r["perplexity_ratio"] for r in rows)
    loss = max(
        r["top1_agreement"]["bfloat16_float32"] - r["top1_agreement"]["int8_bfloat16"] for r in rows
    )
    short = max((b["min_rate"] - b["rate"][QUANTISED] for b in behaviours), default=0.0)
    judged = (
        ("perplexity of int8 over that of bfloat16", ratio, MAX_PERPLEXITY_RATIO),
        ("top-1 lost to int8 beyond what bfloat16 loses", loss, MAX_TOP1_LOSS),
        ("stated rate of an adapter less its rate with int8", short, 0.0),
    )
    return [
        {"bar": name, "value": value, "at_most": most, "holds": value <= most}
        for name, value, most in judged
    ]


def table(numbers: dict[str, Any]) -> str:
    """A line for each kind of text and each behaviour, then the bars."""
    titles = ("read by", "text", "tokens", "perplexity fp32/bf16/int8", "KL bf16/int8", "top-1")
    lines = ["{:>10} {:>7} {:>7} {:>27} {:>17} {:>20}".format(*titles)]
    for r in numbers["rows"]:
        perplexity = "/".join(f"{value:.3f}" for value in r["perplexity"].values())
        kl = "/".join(f"{value:.5f}" for value in r["kl_to_float32"].values())
        top = "/".join(f"{100 * value:.2f}" for value in r["top1_agreement"].values())
        reader = r["adapter"] or "base"
        lines.append(
            f"{reader:>10} {r['text']:>7} {r['num_tokens']:>7} {perplexity:>27} {kl:>17} {top:>20}"
        )
    lines.append("top-1: bf16 = fp32, int8 = fp32, int8 = bf16, in %")
    for b in numbers["behaviours"]:
        rates = "/".join(f"{value:.2f}" for value in b["rate"].values())
        same = b["int8_answers_equal_to_bfloat16"]
        lines.append(f"{b['adapter']:>10} shown by {rates} of its answers; same text {same:.2f}")
    for bar in numbers.get("bars", ()):
        verdict = "holds" if bar["holds"] else "MISSED"
        lines.append(f"{bar['bar']}: {bar['value']:.4f}, at most {bar['at_most']}: {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
