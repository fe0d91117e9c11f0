"""The incremental detokenizer: tokens in, whole characters out.

Works on the bytes of tokens, so a character that is spread over tokens appears once it is whole.
"""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """The text of one completion.

    The pieces joined are the bytes of all tokens decoded at once; bytes that can become no
    character any more are U+FFFD, as in a full decode. A character is held back while tokens may
    still complete it, at most 3 bytes.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, often none or several."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD if the tokens ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
