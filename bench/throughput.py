"""What do 32 distinct adapters in one batch cost, beside the base model alone and transformers?

Embedded model, closed batch: 32 requests at once, random prompts of 128 tokens, 64 tokens out,
greedy, end of sequence ignored. The engine runs as in the server, in a process of its own, without
HTTP. Before timing, log-probabilities of adapter answers are held against dense fp32 arithmetic.
Ends in a table and one JSON line; --output keeps the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adapters_store.store import AdapterStore
from bench.random_adapters import write_adapter
from server.config import Settings
from server.engine.client import EngineClient
from server.engine.request import AdapterImage, Finished, Sampling, Submit, TokenEvent
from server.engine.spec import EngineSpec, engine_spec
from server.model.source import resolve_source


def main() -> None:
    """Run the bench and print its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        results = asyncio.run(run(options, Path(directory)))
    print(table(results))
    line = json.dumps(results)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(line + "\n")
    print(line)


async def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure base and adapters in turn, in one engine, then transformers."""
    settings = Settings(
        model="embedded",
        dtype=options.dtype,
        data_dir=directory / "data",
        max_num_seqs=options.requests,
    )
    spec = engine_spec(settings)
    images = store_adapters(spec, options, directory)
    prompts = np.random.default_rng(0).integers(100, 40000, (options.requests, options.prompt))
    engine = EngineClient(spec)
    started = time.perf_counter()
    await engine.start()
    start_seconds = time.perf_counter() - started
    try:
        errors = await check(engine, directory, images, prompts)
        rows: dict[str, list[dict[str, float]]] = {"base": [], "adapters": []}
        for run_number in range(-1, options.runs):  # the first one warms up
            for name in rows:
                chosen = images if name == "adapters" else [None] * options.requests
                figures = await batch(engine, f"{name}{run_number}", prompts, chosen, options)
                if run_number >= 0:
                    rows[name].append(figures)
    finally:
        await engine.stop()
    results: dict[str, Any] = {
        "bench": "throughput",
        **machine(),
        "dtype": spec.dtype,
        "parameters": {k: v for k, v in vars(options).items() if k not in ("output",)},
        "start_seconds": round(start_seconds, 2),
        "check": errors,
        "base": summary(rows["base"]),
        "adapters": summary(rows["adapters"]),
    }
    results["adapters_over_base"] = ratio(rows["adapters"], rows["base"])
    if not options.no_transformers:
        rival = transformers_generate(options, prompts)
        results["transformers"] = rival
        results["base_over_transformers"] = round(
            results["base"]["output_tokens_per_second"]["median"] / rival["best"], 3
        )
    return results


def store_adapters(
    spec: EngineSpec, options: argparse.Namespace, directory: Path
) -> list[AdapterImage]:
    """As many adapters as requests, admitted by the store."""
    store = AdapterStore(
        directory / "data", spec.layout, max_rank=spec.max_adapter_rank, max_pages=None
    )
    images = []
    for i in range(options.requests):
        peft = write_adapter(directory / f"adapter-{i}", spec.layout, options.rank, i)
        version = store.add(f"adapter-{i}", peft)
        images.append(AdapterImage(version.digest, str(store.image(version))))
    store.close()
    return images


async def generate(
    engine: EngineClient, request: Submit, clock: list[float] | None = None
) -> list[TokenEvent]:
    """A request's token events; the time of each goes to `clock`. Raises if it failed."""
    events = []
    async for event in engine.generate(request):
        if isinstance(event, Finished):
            if event.reason == "error":
                raise RuntimeError(event.error)
            return events
        wanted = request.adapter.digest if request.adapter else None
        if event.adapter_digest != wanted:
            raise RuntimeError(f"{event.adapter_digest} answered for {wanted}")
        if clock is not None:
            clock.append(time.perf_counter())
        events.append(event)
    raise RuntimeError("no final event")


def submit(
    name: str, prompt: np.ndarray, image: AdapterImage | None, tokens: int, **sampling: Any
) -> Submit:
    """A greedy request of a fixed length."""
    return Submit(
        request_id=name,
        prompt_token_ids=tuple(prompt.tolist()),
        sampling=Sampling(max_tokens=tokens, temperature=0.0, **sampling),
        adapter=image,
    )


async def batch(
    engine: EngineClient,
    name: str,
    prompts: np.ndarray,
    images: list[Any],
    options: argparse.Namespace,
) -> dict[str, float]:
    """All requests at once; tokens per second, time to first token, time between tokens."""
    clocks: list[list[float]] = [[] for _ in prompts]
    requests = [
        submit(f"{name}-{i}", prompt, image, options.tokens)
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True))
    ]
    begin = time.perf_counter()
    await asyncio.gather(
        *(generate(engine, r, clock) for r, clock in zip(requests, clocks, strict=True))
    )
    seconds = time.perf_counter() - begin
    num_output = sum(len(clock) for clock in clocks)
    last_first = max(clock[0] for clock in clocks)
    decoded = sum(t > last_first for clock in clocks for t in clock)
    decode_seconds = max(clock[-1] for clock in clocks) - last_first
    return {
        "output_tokens_per_second": num_output / seconds,
        "total_tokens_per_second": (num_output + prompts.size) / seconds,
        "decode_tokens_per_second": decoded / decode_seconds,
        "last_first_token_seconds": last_first - begin,
    }


async def check(
    engine: EngineClient,
    directory: Path,
    images: list[AdapterImage],
    prompts: np.ndarray,
) -> dict[str, float]:
    """Mean distance of answers' log-probabilities from dense fp32, with and without the adapter.

    Raises RuntimeError where an answer is nearer to the base model than to its adapter.
    """
    from safetensors.torch import load_file

    model = load_transformers(torch.float32)
    found: list[tuple[float, float]] = []
    for i in range(min(3, len(images))):
        request = submit(f"check-{i}", prompts[i], images[i], 8, num_logprobs=0)
        events = await generate(engine, request)
        tokens = [token for event in events for token in event.token_ids]
        ours = [entry.chosen for event in events for entry in event.logprobs or ()]
        base = score(model, prompts[i], tokens)
        change = load_file(directory / f"adapter-{i}" / "adapter_model.safetensors")
        apply(model, change, 2.0)
        dense = score(model, prompts[i], tokens)
        apply(model, change, -2.0)
        found.append((mean_distance(ours, dense), mean_distance(ours, base)))
    to_dense, to_base = (statistics.fmean(column) for column in zip(*found, strict=True))
    if to_dense > 0.2 or to_dense * 2 > to_base:
        raise RuntimeError(f"answers are {to_dense} from dense arithmetic, {to_base} from the base")
    return {"distance_to_dense": round(to_dense, 4), "distance_to_base": round(to_base, 4)}


def apply(model: Any, tensors: dict[str, torch.Tensor], scaling: float) -> None:
    """Add scaling · B A to the model's weights."""
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(path).weight.data += scaling * (b.float() @ a.float())


@torch.inference_mode()
def score(model: Any, prompt: np.ndarray, tokens: list[int]) -> list[float]:
    """Log-probabilities of tokens after a prompt."""
    ids = torch.tensor([[*prompt.tolist(), *tokens]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def mean_distance(left: list[float], right: list[float]) -> float:
    """Mean absolute difference."""
    return statistics.fmean(abs(a - b) for a, b in zip(left, right, strict=True))


def load_transformers(dtype: torch.dtype) -> Any:
    """The embedded model in transformers."""
    path = resolve_source("embedded").path
    config = transformers.GgufConfig(gguf_file=path.name, dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=config
    ).eval()


@torch.inference_mode()
def transformers_generate(options: argparse.Namespace, prompts: np.ndarray) -> dict[str, Any]:
    """Output tokens per second of one padded batch of `generate`, in fp32 and in bf16."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_transformers(dtype)
        ids = torch.from_numpy(prompts)
        arguments = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "max_new_tokens": options.tokens,
            "min_new_tokens": options.tokens,
        }
        model.generate(ids[:, :8], **(arguments | {"attention_mask": torch.ones_like(ids[:, :8])}))
        begin = time.perf_counter()
        output = model.generate(ids, **arguments)
        seconds = time.perf_counter() - begin
        assert output.shape[1] == options.prompt + options.tokens
        rates[str(dtype).removeprefix("torch.")] = round(options.tokens * len(ids) / seconds, 1)
    return {"output_tokens_per_second": rates, "best": max(rates.values())}


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, p10 and p90 of each figure."""
    result = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        result[key] = {
            k: round(float(v), 3)
            for k, v in zip(("median", "p10", "p90"), (median, p10, p90), strict=True)
        }
    return result


def ratio(ours: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """Median over runs of the ratio of runs made side by side."""
    return {
        key: round(statistics.median(a[key] / b[key] for a, b in zip(ours, other, strict=True)), 3)
        for key in ("output_tokens_per_second", "decode_tokens_per_second")
    }


def machine() -> dict[str, Any]:
    """Commit, versions and processor."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def table(results: dict[str, Any]) -> str:
    """The figures for people."""
    rows = [("", "output tokens/s", "decode tokens/s", "p10 to p90 of output")]
    for name, label in (("base", "base only"), ("adapters", "a distinct adapter each")):
        output = results[name]["output_tokens_per_second"]
        decode = results[name]["decode_tokens_per_second"]
        spread = f"{output['p10']:.0f} to {output['p90']:.0f}"
        rows.append((label, f"{output['median']:.0f}", f"{decode['median']:.0f}", spread))
    if "transformers" in results:
        rows.append(
            ("transformers generate, base", f"{results['transformers']['best']:.0f}", "", "")
        )
    ratios = results["adapters_over_base"]
    lines = ["  ".join(f"{cell:>28}" for cell in row) for row in rows]
    lines.append(
        f"adapters / base: {ratios['output_tokens_per_second']:.2f} of output, "
        f"{ratios['decode_tokens_per_second']:.2f} of decode"
    )
    if "transformers" in results:
        lines.append(f"base / transformers: {results['base_over_transformers']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
