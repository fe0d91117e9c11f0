"""Tiny random models of every family, and batches of sequences on scattered pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from adapters_store.layout import TARGET_PATHS
from kernels.layout import AdapterIndex, AttentionIndex, RankRows, row_elements
from server.model.config import ModelConfig
from server.model.decoder import Decoder, StepInput

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2_multi_head": ("llama", {"num_key_value_heads": 4}),
    "llama3_scaled_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama_all_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral_sliding_window": ("mistral", {"sliding_window": 4, "head_dim": 16}),
    "mistral_full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn_tied": ("qwen2", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
    "qwen2_window_in_upper_layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied_biased": (
        "qwen3",
        {"head_dim": 10, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3_untied": ("smollm3", {"no_rope_layers": [1, 1, 0], "tie_word_embeddings": False}),
}

SEQUENCE_LENGTHS = (13, 1, 7, 10)
PAGE_ORDER_SEED = 5


@dataclass
class TinyModel:
    """A random model in memory, and the directory that transformers saved it to."""

    model: transformers.PreTrainedModel
    directory: Path


@dataclass
class PagedSequence:
    """Tokens of one sequence and where its k and v lie."""

    token_ids: Tensor
    slot: int
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0


class PagedBatch:
    """Sequences, adapters and their pages; pages are taken in a random order and start as NaN."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.block_size = config, 4
        page_elements = self.block_size * config.kv_elements_per_token
        self.storage = torch.full((96, page_elements), torch.nan, dtype=dtype)
        generator = torch.Generator().manual_seed(PAGE_ORDER_SEED)
        self._free = torch.randperm(96, generator=generator).tolist()
        self.sequences: list[PagedSequence] = []
        num_columns = config.num_layers * len(TARGET_PATHS) + 1
        self._row_ptr = torch.zeros(8, num_columns, dtype=torch.int32)
        self._row_offset = torch.zeros(8, 4096, dtype=torch.int64)
        self._row_scale = torch.zeros(8, 4096)

    def add_sequence(self, token_ids: Tensor, slot: int = -1) -> None:
        self.sequences.append(PagedSequence(token_ids, slot))
        self.sequences.sort(key=lambda sequence: sequence.slot)

    def add_adapter(
        self, slot: int, rows: dict[tuple[int, str], tuple[Tensor, Tensor, float]]
    ) -> None:
        """Pack A [r, in], B [out, r] and the scaling of every (layer, target), row by row."""
        page, used, i = self._free.pop(), 0, 0
        page_elements = self.storage.shape[1]
        for layer in range(self.config.num_layers):
            for t, shape in enumerate(self.config.target_shapes()):
                a, b, scaling = rows.get((layer, shape.name), (None, None, 0.0))
                size = row_elements(shape.in_features, shape.out_features)
                for r in range(0 if a is None else len(a)):
                    if used + size > page_elements:
                        page, used = self._free.pop(), 0
                    row = self.storage[page, used : used + size]
                    row.zero_()
                    row[: shape.in_features] = a[r]
                    row[size - _aligned(shape.out_features) :][: shape.out_features] = b[:, r]
                    self._row_offset[slot, i] = page * page_elements + used
                    self._row_scale[slot, i] = scaling
                    used, i = used + size, i + 1
                self._row_ptr[slot, layer * len(TARGET_PATHS) + t + 1] = i

    def step(self, counts: list[int]) -> StepInput:
        """Compute the next counts[s] tokens of every sequence s; logits of all of them."""
        running = [(s, n) for s, n in zip(self.sequences, counts, strict=True) if n]
        for sequence, count in running:
            while len(sequence.pages) * self.block_size < sequence.num_computed + count:
                sequence.pages.append(self._free.pop())
        positions = [range(s.num_computed, s.num_computed + n) for s, n in running]
        kv_slot = [
            s.pages[p // self.block_size] * self.block_size + p % self.block_size
            for (s, _), span in zip(running, positions, strict=True)
            for p in span
        ]
        token_ids = torch.cat([s.token_ids[s.num_computed :][:n] for s, n in running])
        for sequence, count in running:
            sequence.num_computed += count
        return StepInput(
            token_ids=token_ids,
            positions=torch.tensor([p for span in positions for p in span], dtype=torch.int32),
            kv_slot=torch.tensor(kv_slot),
            logit_rows=torch.arange(len(token_ids)),
            attention=_attention_index(running),
            adapters=self._adapter_index(running),
            rows=RankRows(self._row_ptr, self._row_offset, self._row_scale),
            storage=self.storage,
        )

    def _adapter_index(self, running: list[tuple[PagedSequence, int]]) -> AdapterIndex:
        tokens = [s.slot for s, n in running for _ in range(n)]
        slots = sorted({slot for slot in tokens if slot >= 0})
        starts = [tokens.index(slot) for slot in slots] + [len(tokens)]
        ptr = self._row_ptr
        return AdapterIndex(
            token_slot=torch.tensor(tokens, dtype=torch.int32),
            segment_start=torch.tensor(starts, dtype=torch.int32),
            segment_slot=torch.tensor(slots, dtype=torch.int32),
            num_base=tokens.count(-1),
            max_segment=max((tokens.count(slot) for slot in slots), default=0),
            max_span_rows=max((int((ptr[s, 3:] - ptr[s, :-3]).max()) for s in slots), default=0),
        )


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _attention_index(running: list[tuple[PagedSequence, int]]) -> AttentionIndex:
    lengths = torch.tensor([0] + [n for _, n in running])
    table = torch.zeros(len(running), max(len(s.pages) for s, _ in running), dtype=torch.int32)
    for row, (sequence, _) in enumerate(running):
        table[row, : len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
    single = [n == 1 for _, n in running]
    context = [s.num_computed for s, _ in running]
    return AttentionIndex(
        query_start=lengths.cumsum(0).int(),
        context_len=torch.tensor(context, dtype=torch.int32),
        block_table=table,
        decode=torch.tensor([i for i, d in enumerate(single) if d], dtype=torch.int32),
        prefill=torch.tensor([i for i, d in enumerate(single) if not d], dtype=torch.int32),
        max_query=max(n for _, n in running),
        max_context=max(context),
    )


def _teacher_forced(decoder: Decoder, batch: PagedBatch) -> list[Tensor]:
    """Logits of every token: prompts in chunks, joining one step apart, then token by token."""
    logits: list[list[Tensor]] = [[] for _ in batch.sequences]
    num_steps = 0
    while any(s.num_computed < len(s.token_ids) for s in batch.sequences):
        counts = []
        for i, sequence in enumerate(batch.sequences):
            chunk = (5, 3)[num_steps - i] if 0 <= num_steps - i < 2 else 1
            left = len(sequence.token_ids) - sequence.num_computed
            counts.append(min(chunk, left) if num_steps >= i else 0)
        out = decoder.forward(batch.step(counts))
        for sequence_logits, part in zip(logits, out.split(counts), strict=True):
            sequence_logits.append(part)
        num_steps += 1
    return [torch.cat(parts) for parts in logits]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more by waiting for a second thread than it gives them."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """tiny_model(name): the model of that name in TINY_CONFIGS, fp32, built once."""
    built: dict[str, TinyModel] = {}

    def build(name: str) -> TinyModel:
        if name not in built:
            family, changes = TINY_CONFIGS[name]
            config = transformers.AutoConfig.for_model(family, **(SHAPE | changes))
            config._attn_implementation = "eager"
            with torch.random.fork_rng():
                torch.manual_seed(len(name))
                model = transformers.AutoModelForCausalLM.from_config(config).eval()
                for parameter in model.parameters():
                    is_norm = parameter.dim() == 1
                    torch.nn.init.normal_(parameter, 1.0 if is_norm else 0.0, 0.2)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            built[name] = TinyModel(model, directory)
        return built[name]

    return build


@pytest.fixture(params=sorted(TINY_CONFIGS))
def each_tiny_model(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]
) -> TinyModel:
    return tiny_model(request.param)


@pytest.fixture
def paged_batch() -> type[PagedBatch]:
    """The class of a batch: PagedBatch(config, dtype)."""
    return PagedBatch


@pytest.fixture
def teacher_forced() -> Callable[[Decoder, PagedBatch], list[Tensor]]:
    """teacher_forced(decoder, batch): logits [len, vocab] of each sequence of the batch."""
    return _teacher_forced


@pytest.fixture
def prompts() -> list[Tensor]:
    """Token ids of a few sequences of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in SEQUENCE_LENGTHS]
