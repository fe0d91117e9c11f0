"""Tokenizers from directories and GGUF files, and the cache of converted ones."""

from __future__ import annotations

import os

import gguf
import pytest
import tokenizers
import transformers

import server.model.tokenizer as tokenizer_module
from server.model.config import ModelError
from server.model.source import resolve_source
from server.model.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = ["hello hello", "  Ünïcode\n\n漢字 \t12", ""]


def byte_alphabet():
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def gguf_source(tmp_path):
    """A GGUF file with a byte-level vocabulary, two merges and a chat template, but no weights."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", *byte_alphabet(), "he", "ll"])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return resolve_source(str(path))


def test_a_cached_tokenizer_is_the_converted_one(gguf_source, tmp_path):
    converted = load_tokenizer(gguf_source)
    cache = tmp_path / "cache"
    for _ in range(2):
        cached = load_tokenizer(gguf_source, cache)
        assert cached.get_vocab() == converted.get_vocab()
        assert cached.eos_token_id == converted.eos_token_id == 0
        assert cached.chat_template == converted.chat_template == TEMPLATE
        for text in TEXTS:
            token_ids = cached(text).input_ids
            assert token_ids == converted(text).input_ids
            assert cached.decode(token_ids) == converted.decode(token_ids)


def test_a_cached_tokenizer_is_not_converted_again(gguf_source, tmp_path, monkeypatch):
    load_tokenizer(gguf_source, tmp_path / "cache")
    monkeypatch.delattr(tokenizer_module, "_from_gguf")
    assert load_tokenizer(gguf_source, tmp_path / "cache").chat_template == TEMPLATE


def test_a_changed_file_is_converted_again(gguf_source, tmp_path):
    load_tokenizer(gguf_source, tmp_path / "cache")
    os.utime(gguf_source.path, ns=(1, 1))
    load_tokenizer(gguf_source, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 2


def test_a_failed_write_leaves_nothing_in_the_cache(gguf_source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        load_tokenizer(gguf_source, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_directory_brings_its_tokenizer_and_chat_template(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<end>": 0, "a": 1, "b": 2}, []))
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    saved.chat_template = TEMPLATE
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(resolve_source(str(tmp_path)))
    assert loaded("abba").input_ids == [1, 2, 2, 1]
    assert loaded.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "ab"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "<user>ab"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be read"):
        load_tokenizer(resolve_source(str(tmp_path)))


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"tokenizer in .*tiny\.gguf cannot be read"):
        load_tokenizer(resolve_source(str(path)))
