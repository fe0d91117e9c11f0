"""Small tokenizers of both kinds: byte-level, and SentencePiece-like with byte fallback."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from server.text.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat", "Grüße, 日本語 🦜🏴‍☠️", "stop here. STOP there!", "a\n\nb\tc  d"]
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with a user') }}{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|start|>"
    )
    hf.add_tokens(["<think>", "two words"])
    hf.add_tokens([AddedToken("<no_role>", special=True)])
    hf.chat_template = TEMPLATE
    return hf


def byte_fallback() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("▁", "a", "b", "▁a", "▁b", "ab", "é"):
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def byte_level_hf() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def byte_fallback_hf() -> PreTrainedTokenizerFast:
    return byte_fallback()


@pytest.fixture(scope="session")
def tokenizer(byte_level_hf: PreTrainedTokenizerFast) -> Tokenizer:
    return Tokenizer(byte_level_hf)
