"""The same model and adapters for every rival, each in the form that it reads.

The embedded model's weights, dequantised and rounded to bf16 once: as a Hugging Face directory and
as a GGUF file. The adapters are random, of rank 16 on all linear layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.rivals.environments import RIVALS

MODELS = RIVALS / "models"
MODEL = MODELS / "SmolLM2-135M-Instruct"
GGUF = MODELS / "SmolLM2-135M-Instruct.bf16.gguf"
NUM_ADAPTERS, RANK = 32, 16


def adapter_name(index: int) -> str:
    """The public name of an adapter; `index` in [0, NUM_ADAPTERS)."""
    return f"adapter-{index:02d}"


def adapter_directory(index: int) -> Path:
    """An adapter as PEFT writes it."""
    return MODELS / adapter_name(index)


def write_model_files() -> None:
    """Write what is not there yet of the model in both forms and of the adapters."""
    from bench.random_adapters import write_adapter
    from server.config import Settings
    from server.engine.spec import engine_spec

    write_once(MODEL, _write_model)
    write_once(GGUF, _write_gguf)
    layout = engine_spec(Settings.model_validate({"model": str(MODEL), "dtype": "bfloat16"})).layout
    for index in range(NUM_ADAPTERS):
        write = partial(write_adapter, layout=layout, rank=RANK, seed=index)
        write_once(adapter_directory(index), write)


def write_once(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file or directory that is not there; it appears when it is whole."""
    if path.exists():
        print(f"{path} is there", flush=True)
        return
    print(f"+ write {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    write(unfinished)
    unfinished.rename(path)


def _write_model(directory: Path) -> None:
    import torch
    import transformers

    from server.model.source import resolve_source

    path = resolve_source("embedded").path
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(gguf_file=path.name, dequantize=True),
    )
    model.save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(directory)


def _write_gguf(path: Path) -> None:
    """The embedded file again, every matrix in bf16; norms are rounded to bf16 and stay fp32."""
    import gguf

    from server.model.source import resolve_source

    reader = gguf.GGUFReader(resolve_source("embedded").path)
    writer = gguf.GGUFWriter(path, arch=reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            item_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, _value(field), field.types[0], sub_type=item_type)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        rounded = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), bf16)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, gguf.dequantize(rounded, bf16))
        else:
            writer.add_tensor(tensor.name, rounded, raw_shape=rounded.shape, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value(field: Any) -> Any:
    import gguf

    is_file_type = field.name == "general.file_type"
    return int(gguf.LlamaFileType.MOSTLY_BF16) if is_file_type else field.contents()
