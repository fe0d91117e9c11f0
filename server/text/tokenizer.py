"""The tokenizer: text and chat messages to token ids, token ids to bytes.

Wraps a transformers tokenizer that the caller loaded; knows no HTTP and no sampling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from server.errors import InvalidRequest

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_KNOWN_DECODERS = {"ByteLevel", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}


class Tokenizer:
    """Encodes prompts and gives the bytes of tokens; safe to call from several threads.

    `hf` is a transformers tokenizer with a `tokenizers` backend. `eos_token_ids` end a
    completion; the tokenizer's own unless the model's generation settings name others.
    Raises ValueError for a tokenizer that is not byte-level or SentencePiece-like BPE.
    """

    def __init__(self, hf: Any, eos_token_ids: Sequence[int] | None = None) -> None:
        if getattr(hf, "backend_tokenizer", None) is None:
            raise ValueError(f"{type(hf).__name__} has no fast tokenizer: save a tokenizer.json")
        self._hf = hf
        # transformers' own __call__ writes truncation settings, which threads would race for.
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._is_byte_level = _is_byte_level(json.loads(self._backend.to_str())["decoder"])
        added = hf.added_tokens_decoder.items()
        self._added = {i: str(token) for i, token in added}
        # all_special_ids has only those with a role, such as end of text.
        self._special_ids = {*hf.all_special_ids, *(i for i, token in added if token.special)}
        self._bytes: dict[int, bytes] = {}
        own_eos = () if hf.eos_token_id is None else (hf.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(
            own_eos if eos_token_ids is None else eos_token_ids
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._hf)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the model begins a text by."""
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation as the model's chat template writes it.

        The template ends where the assistant's answer begins. Raises InvalidRequest where there
        is no template or the template refuses the messages.
        """
        return list(self._backend.encode(self.render(messages), add_special_tokens=False).ids)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the chat template makes of `messages`; InvalidRequest as `encode_chat`."""
        if self._hf.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: send a prompt to /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        try:
            text = self._hf.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}; change their roles, "
                "order or content",
                param="messages",
                code="chat_template_error",
            ) from error
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to a text; b"" for special and unknown tokens.

        Nothing is stripped: a token continues the text before it, so a word's space stays.
        """
        cached = self._bytes.get(token_id)
        if cached is None:
            cached = self._bytes[token_id] = self._read_bytes(token_id)
        return cached

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure (end of text, role) and is no text."""
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """The token for people: its text, a special token's name, or `bytes:\\x..` for a part."""
        if self.is_special(token_id):
            return self._added.get(token_id, "")
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _read_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return str(token).encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace(_WORD_START, " ").encode()


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether tokens spell bytes as characters; ValueError for a decoder of neither kind."""
    if decoder is None:
        raise ValueError("the tokenizer has no decoder: it is neither byte-level nor SentencePiece")
    kinds = {step["type"] for step in decoder.get("decoders", [decoder])}
    if unknown := sorted(kinds - _KNOWN_DECODERS):
        raise ValueError(f"tokenizer decoder {', '.join(unknown)} is not supported")
    return "ByteLevel" in kinds


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    table.update({chr(0x100 + i): byte for i, byte in enumerate(rest)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
