"""The base model's tokenizer and chat template, from the same files as its weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from server.model.config import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from server.model.source import ModelSource

_UNREADABLE = Exception
"""What is raised for files that hold no tokenizer, or a broken one: the tokenizers package has
nothing narrower, and transformers lets pass whatever its parsing meets."""

_FORMAT = 2
"""Of the directories in the cache."""

_DIGESTS = "sha256.json"
"""In each of them: the digest of every other file."""


def load_tokenizer(source: ModelSource, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, its chat template with it where it has one.

    Finding and converting it takes transformers seconds: under `cache_dir` the result is kept, for
    the files' names, sizes and times of change, and for the version of transformers. A damaged
    copy is made anew. Raises ModelError where the files hold no tokenizer.
    """
    if cache_dir is None:
        return _converted(source)
    cached = cache_dir / "tokenizers" / _cache_key(source.path)
    if _is_whole(cached):
        return _from_cache(cached)
    tokenizer = _converted(source)
    _save_atomically(tokenizer, cached)
    return tokenizer


def _converted(source: ModelSource) -> PreTrainedTokenizerBase:
    path = source.path
    try:
        if source.is_gguf:
            return transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        return transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except _UNREADABLE as error:
        raise ModelError(
            f"the tokenizer of {source.name} in {path} cannot be read: {error}"
        ) from error


def _from_cache(directory: Path) -> PreTrainedTokenizerBase:
    """Without AutoTokenizer, which imports torch and every config."""
    tokenizer: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast.from_pretrained(
        directory, local_files_only=True
    )
    return tokenizer


def _survives(tokenizer: PreTrainedTokenizerBase, directory: Path) -> bool:
    """Whether what was saved to `directory` is the tokenizer, in all that a server asks it."""

    def essence(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
        return (
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.added_tokens_decoder,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
        )

    try:
        return essence(_from_cache(directory)) == essence(tokenizer)
    except _UNREADABLE:  # one without a tokenizer.json, for example
        return False


def _cache_key(path: Path) -> str:
    """32 hex digits that differ when the files or their conversion would."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    status = [(str(file.resolve()), file.stat()) for file in files]
    identity = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
    return hashlib.sha256(repr((_FORMAT, transformers.__version__, identity)).encode()).hexdigest()[
        :32
    ]


def _digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.iterdir())
        if file.name != _DIGESTS
    }


def _is_whole(directory: Path) -> bool:
    """Whether a directory of the cache holds what was written to it."""
    try:
        return bool(json.loads((directory / _DIGESTS).read_bytes()) == _digests(directory))
    except (OSError, ValueError):
        return False


def _save_atomically(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer to `directory`, whole or not at all; not one that would change by it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory.parent) as unfinished:
        written = Path(unfinished) / "tokenizer"
        tokenizer.save_pretrained(written)
        if not _survives(tokenizer, written):
            return
        (written / _DIGESTS).write_text(json.dumps(_digests(written)))
        shutil.rmtree(directory, ignore_errors=True)  # damaged, or not there
        written.rename(directory)
