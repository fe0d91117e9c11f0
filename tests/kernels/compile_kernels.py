"""Compiles every Triton kernel as its launcher would launch it, and prints what came out as JSON.

A program of its own, since Triton must not be in its interpreter; `main` says its arguments. The
launchers run on tensors without data; their launches are recorded, specialised as Triton's own
launcher does it, and compiled for a target that need not be there.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
from inspect_machine_code import inspect_amdgcn, inspect_cubin
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels.triton.ops as ops
from kernels.layout import AdapterIndex, AttentionIndex, RankRows, TargetSpan
from kernels.triton import (
    activation,
    attention_decode,
    attention_prefill,
    bgmv,
    norm,
    rope,
    sgmv,
)

MODULES = (activation, attention_decode, attention_prefill, bgmv, norm, rope, sgmv)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TILE = ("BLOCK_T", "BLOCK_M", "BLOCK_R", "BLOCK_N", "BLOCK_I", "BLOCK_O", "BLOCK_H", "BLOCK_C")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Model:
    """The shapes of one base model."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_norm: bool = False
    window: int = 0
    dtype: torch.dtype = torch.bfloat16

    def spans(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Inputs and output widths of each fused span."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, (q, kv, kv)),
            "o": (q, (self.hidden,)),
            "gate_up": (self.hidden, (self.intermediate, self.intermediate)),
            "down": (self.intermediate, (self.hidden,)),
        }


MODELS = {
    "llama-3-8b": Model(4096, 14336, 32, 8, 128),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128),
    "qwen3-8b": Model(4096, 12288, 32, 8, 128, head_norm=True),
    "mistral-7b": Model(4096, 14336, 32, 8, 128, window=4096),
    "smollm2-135m": Model(576, 1536, 9, 3, 64),
    "smollm2-135m-fp16": Model(576, 1536, 9, 3, 64, dtype=torch.float16),
    "smollm2-135m-fp32": Model(576, 1536, 9, 3, 64, dtype=torch.float32),
}


@dataclass(frozen=True)
class Step:
    """The sizes that differ from step to step."""

    num_tokens: int = 337
    num_base: int = 5
    num_segments: int = 40
    max_span_rows: int = 48
    first_target: int = 7
    num_decodes: int = 4
    num_prefills: int = 3
    max_query: int = 30
    max_context: int = 1500


STEPS = (
    Step(),
    Step(128, 0, 1, 1, 0, 1, 1, 2, 3),
    Step(2048, 16, 64, 448, 16, 16, 16, 512, 8192),
    *(
        Step(num_tokens=num_tokens, num_base=0, num_segments=num_segments, max_span_rows=3 * rank)
        for rank in (8, 16, 32, 64, 128)
        for num_tokens, num_segments in ((1, 1), (32, 32), (512, 1), (512, 64))
    ),
)
"""The first is compiled; the others, of every rank and of one token to many, need the same code."""
SEGMENTS = (3, 16, 100)  # the longest segment: BGMV, SGMV in short tiles, SGMV in long ones


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    what: str  # the operation's input, to tell the launches of a kernel apart
    kernel: JITFunction
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Recorder:
    """Stands for a kernel in its module."""

    def __init__(self, kernel: JITFunction, launches: list[Launch], label: list[str]) -> None:
        self.kernel, self.launches, self.label = kernel, launches, label

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **keywords: self.launches.append(
            Launch(self.label[0], self.kernel, args, keywords)
        )


def record(model: Model, step: Step) -> list[Launch]:
    """Every launch of `step`: adapters with short, middling and long segments, and the rest."""
    launches: list[Launch] = []
    label = [""]
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Recorder(value, launches, label))
    try:
        for span, (in_features, widths) in model.spans().items():
            for max_segment in SEGMENTS:
                label[0] = f"{span}, segments of {max_segment}"
                run_adapters(model, step, in_features, widths, max_segment)
        label[0] = "step"
        run_step(model, step)
    finally:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if isinstance(value, Recorder):
                    setattr(module, name, value.kernel)
    return launches


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_adapters(
    model: Model, step: Step, in_features: int, widths: tuple[int, ...], max_segment: int
) -> None:
    index = AdapterIndex(
        token_slot=empty(step.num_tokens),
        segment_start=empty(step.num_segments + 1),
        segment_slot=empty(step.num_segments),
        num_base=step.num_base,
        max_segment=max_segment,
        max_span_rows=step.max_span_rows,
    )
    rows = RankRows(
        empty(64, 225), empty(64, 3584, dtype=torch.int64), empty(64, 3584, dtype=torch.float32)
    )
    ops.add_adapters(
        empty(step.num_tokens, sum(widths), dtype=model.dtype),
        empty(step.num_tokens, in_features, dtype=model.dtype),
        empty(16, 1 << 20, dtype=model.dtype),
        rows,
        index,
        TargetSpan(step.first_target, (0, *itertools.accumulate(widths))),
    )


def run_step(model: Model, step: Step) -> None:
    dtype, num_tokens, block_size = model.dtype, step.num_tokens, 16
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    qkv = empty(num_tokens, width, dtype=dtype)
    page = (4, 2, block_size, model.num_kv_heads, model.head_dim)
    kv_cache = empty(16, *page, dtype=dtype)[:, 1]
    x, weight = empty(num_tokens, model.hidden, dtype=dtype), empty(model.hidden, dtype=dtype)
    head_weight = empty(model.head_dim, dtype=dtype) if model.head_norm else None
    ops.rms_norm(x, weight, 1e-5)
    ops.add_rms_norm(x, x, weight, 1e-5)
    ops.silu_mul(empty(num_tokens, 2 * model.intermediate, dtype=dtype))
    cos_sin = empty(8192, model.head_dim, dtype=torch.float32)
    slots = empty(num_tokens, dtype=torch.int64)
    ops.rope_store_kv(
        qkv, cos_sin, empty(num_tokens), kv_cache, slots, head_weight, head_weight, 1e-6
    )
    num_sequences = step.num_decodes + step.num_prefills
    index = AttentionIndex(
        query_start=empty(num_sequences + 1),
        context_len=empty(num_sequences),
        block_table=empty(num_sequences, -(-step.max_context // block_size)),
        decode=empty(step.num_decodes),
        prefill=empty(step.num_prefills),
        max_query=step.max_query,
        max_context=step.max_context,
    )
    ops.paged_attention(qkv, kv_cache, index, model.head_dim**-0.5, model.window)


def source_and_options(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The launch as the compiler wants it, specialised as Triton specialises its arguments."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.keywords
    options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """What the compiled launch uses: registers, memory, and the instructions that matter."""
    source, options = source_and_options(launch)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    num_warps, shared_bytes = options.get("num_warps", 4), compiled.metadata.shared
    facts = {
        "target": target,
        "num_warps": num_warps,
        "shared_bytes": shared_bytes,
        "tile_loads": tile_bytes(launch) // (16 * TARGETS[target].warp_size * num_warps),
    }
    if target.startswith("sm"):
        return facts | inspect_cubin(compiled.asm["cubin"], target, num_warps, shared_bytes)
    return facts | inspect_amdgcn(compiled.asm["amdgcn"])


def tile_bytes(launch: Launch) -> int:
    """Bytes of the weights, or of the keys and values, that a program has to read at a time."""
    size = {name: n for name, n in launch.keywords.items() if name.isupper()}
    weights = size.get("BLOCK_R", 0) * (size.get("BLOCK_I") or size.get("BLOCK_O") or 0)
    keys_and_values = 2 * size.get("BLOCK_N", 0) * size.get("HEAD_DIM", 0)
    tensors = [value for value in launch.arguments if isinstance(value, torch.Tensor)]
    itemsize = min(t.itemsize for t in tensors if t.is_floating_point())
    return (weights + keys_and_values) * itemsize


def tile_of(launch: Launch) -> str:
    """The sizes that tell the tiles of one kernel apart, "32 x 16 x 128"."""
    sizes = [str(launch.keywords[name]) for name in TILE if name in launch.keywords]
    return " x ".join(sizes)


def forms(model: Model, step: Step) -> dict[str, Launch]:
    """One launch of each compiled form."""
    found: dict[str, Launch] = {}
    for launch in record(model, step):
        source, options = source_and_options(launch)
        form = f"{launch.kernel.__name__} {source.hash()} {sorted(options.items())}"
        found.setdefault(form, launch)
    return found


def classes(model: str) -> list[dict[str, str]]:
    """Model, kernel, tile and what it is launched for, of every form of STEPS[0]."""
    return [
        {
            "model": model,
            "kernel": launch.kernel.__name__,
            "tile": tile_of(launch),
            "what": launch.what,
        }
        for launch in forms(MODELS[model], STEPS[0]).values()
    ]


def main(jobs: list[str]) -> None:
    """Print one JSON list of what each job finds; a form that several jobs need is compiled once.

    MODEL/TARGET/LABEL+LABEL...: the facts of launches whose label begins so. MODEL/forms: the
    compiled forms that the first of STEPS needs, those that only others need, and the classes.
    """
    found: list[Any] = []
    compiled: dict[tuple[str, str], dict[str, Any]] = {}
    for job in jobs:
        model, target, *labels = job.split("/")
        if target == "forms":
            first, *others = [set(forms(MODELS[model], step)) for step in STEPS]
            found += [sorted(first), sorted(set().union(*others) - first), classes(model)]
        else:
            launches = forms(MODELS[model], STEPS[0]).items()
            for (form, launch), about in zip(launches, classes(model), strict=True):
                if launch.what.startswith(tuple(labels[0].split("+"))):
                    if (form, target) not in compiled:
                        compiled[form, target] = compile_launch(launch, target)
                    found.append(about | compiled[form, target])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
