"""The base model's tokenizer and chat template, from the same files as its weights."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from server.model.config import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from server.model.source import ModelSource

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError)
"""What transformers raises for files that hold no tokenizer, or a broken one."""


def load_tokenizer(source: ModelSource, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, its chat template with it where it has one.

    Converting that of a GGUF file takes seconds: under `cache_dir` the result is kept, for the
    file's path, size and time of change, and for the version of transformers. Raises ModelError
    where the files hold no tokenizer.
    """
    if not source.is_gguf:
        return _from_pretrained(source, source.path)
    if cache_dir is None:
        return _from_gguf(source)
    cached = cache_dir / "tokenizers" / _cache_key(source.path)
    if not cached.is_dir():
        _save_atomically(_from_gguf(source), cached)
    return _from_pretrained(source, cached)


def _from_pretrained(source: ModelSource, directory: Path) -> PreTrainedTokenizerBase:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except _UNREADABLE as error:
        raise ModelError(
            f"the tokenizer of {source.name} in {directory} cannot be read: {error}"
        ) from error


def _from_gguf(source: ModelSource) -> PreTrainedTokenizerBase:
    path = source.path
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except _UNREADABLE as error:
        raise ModelError(f"the tokenizer in {path} cannot be read: {error}") from error


def _cache_key(path: Path) -> str:
    """32 hex digits that differ when the file or its conversion would."""
    status = path.stat()
    identity = (str(path.resolve()), status.st_size, status.st_mtime_ns, transformers.__version__)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _save_atomically(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the tokenizer to `directory`, whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory.parent) as unfinished:
        written = Path(unfinished) / "tokenizer"
        tokenizer.save_pretrained(written)
        try:
            written.rename(directory)
        except OSError:
            # another process may have been quicker: its directory holds the same
            if not directory.is_dir():
                raise
