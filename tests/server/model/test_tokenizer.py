"""Tokenizers from directories and GGUF files, and the cache of converted ones."""

from __future__ import annotations

import os
import subprocess
import sys

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
    monkeypatch.delattr(tokenizer_module, "_converted")
    assert load_tokenizer(gguf_source, tmp_path / "cache").chat_template == TEMPLATE


def damage_byte(directory):
    path = directory / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"he"', b'"hf"'))


def truncate(directory):
    (directory / "tokenizer.json").write_bytes(b"")


def delete_template(directory):
    (directory / "chat_template.jinja").unlink()


def add_a_file(directory):
    (directory / "special_tokens_map.json").write_text('{"eos_token": "he"}')


def delete_digests(directory):
    (directory / "sha256.json").unlink()


@pytest.mark.parametrize(
    "damage", [damage_byte, truncate, delete_template, add_a_file, delete_digests]
)
def test_a_damaged_copy_is_never_used_and_made_anew(gguf_source, tmp_path, damage, monkeypatch):
    converted = load_tokenizer(gguf_source, tmp_path / "cache")
    (directory,) = (tmp_path / "cache" / "tokenizers").iterdir()
    damage(directory)
    for _ in range(2):
        found = load_tokenizer(gguf_source, tmp_path / "cache")
        assert found.get_vocab() == converted.get_vocab()
        assert found.chat_template == TEMPLATE
        assert found.eos_token_id == 0
        monkeypatch.delattr(tokenizer_module, "_converted", raising=False)


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


def qwen2(directory):
    vocab = {token: i for i, token in enumerate([*byte_alphabet(), "he", "ll"])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[("h", "e"), ("l", "l")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def llama(directory):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("\u2581", "h", "e", "l", "o", "he", "ll"):
        vocab[token] = len(vocab)
    merges = [("h", "e"), ("l", "l")]
    transformers.LlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(directory)


@pytest.mark.parametrize("save", [qwen2, llama])
def test_a_directorys_tokenizer_is_kept_as_its_own_class_reads_it(save, tmp_path, monkeypatch):
    save(tmp_path / "model")
    source = resolve_source(str(tmp_path / "model"))
    own = load_tokenizer(source)
    load_tokenizer(source, tmp_path / "cache")
    monkeypatch.delattr(tokenizer_module, "_converted")
    cached = load_tokenizer(source, tmp_path / "cache")
    assert cached.special_tokens_map == own.special_tokens_map
    assert cached.all_special_ids == own.all_special_ids
    assert cached.chat_template == own.chat_template
    for text in [*TEXTS, "<|im_end|>hello</s>"]:
        token_ids = cached(text).input_ids
        assert token_ids == own(text).input_ids
        assert cached.decode(token_ids) == own.decode(token_ids)


def test_a_tokenizer_that_saving_would_change_is_not_kept(gguf_source, tmp_path, monkeypatch):
    save = transformers.PreTrainedTokenizerBase.save_pretrained

    def save_another(tokenizer, directory, **options):
        save(tokenizer, directory, **options)
        delete_template(directory)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", save_another)
    for _ in range(2):
        tokenizer = load_tokenizer(gguf_source, tmp_path / "cache")
        assert tokenizer.chat_template == TEMPLATE
        assert list((tmp_path / "cache" / "tokenizers").iterdir()) == []


def test_a_cached_tokenizer_is_read_without_torch(gguf_source, tmp_path):
    load_tokenizer(gguf_source, tmp_path / "cache")
    script = (
        "import sys; from pathlib import Path; from server.model.source import resolve_source; "
        "from server.model.tokenizer import load_tokenizer; "
        "load_tokenizer(resolve_source(sys.argv[1]), Path(sys.argv[2])); print(*sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, gguf_source.path, tmp_path / "cache"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "torch" not in run.stdout.split()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be read"):
        load_tokenizer(resolve_source(str(tmp_path)))


@pytest.mark.parametrize(
    "content", ["", "{}", '{"model": {"type": "BPE", "merges": [["a", "b"]]}}']
)
def test_a_directory_with_a_broken_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be read"):
        load_tokenizer(resolve_source(str(tmp_path)))


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"tokenizer of tiny in .*tiny\.gguf cannot be read"):
        load_tokenizer(resolve_source(str(path)))
