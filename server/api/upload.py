"""The multipart body of an adapter upload, streamed into a directory within a size limit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from server.errors import InvalidRequest, PayloadTooLarge

FILE_PARTS = {
    "config": "adapter_config.json",
    "weights": "adapter_model.safetensors",
    "archive": "archive",
}
"""File parts and the names that they get in the directory."""

TEXT_PARTS = frozenset({"adapter_id", "description", "dry_run"})
MAX_TEXT_BYTES = 16 << 10
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(slots=True)
class Upload:
    """What was received: texts by part name, files by part name."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


async def receive_upload(request: Request, directory: Path, max_bytes: int) -> Upload:
    """Stream the body's parts into `directory`.

    Raises PayloadTooLarge as soon as the body exceeds `max_bytes`, InvalidRequest for anything
    that is no complete multipart form of known parts, ClientDisconnect if the body breaks off.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    reader = _PartReader(directory, _boundary(request))
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            await run_in_threadpool(reader.feed, chunk)
        return reader.finish()
    finally:
        reader.close()


class _PartReader:
    """The multipart parser's callbacks; one part is open at a time."""

    def __init__(self, directory: Path, boundary: bytes) -> None:
        self._directory = directory
        self._upload = Upload()
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._part = ""
        self._text = bytearray()
        self._file: IO[bytes] | None = None
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _not_multipart(str(error)) from error

    def finish(self) -> Upload:
        if not self._is_complete:
            raise _not_multipart("the body ends before its closing boundary")
        return self._upload

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part in self._upload.texts or self._part in self._upload.files:
            raise _invalid(self._part, f"part '{self._part}' is there twice: send it once")
        if self._part in FILE_PARTS:
            filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self._open_file(filename)
        elif self._part not in TEXT_PARTS:
            known = ", ".join([*sorted(TEXT_PARTS), *FILE_PARTS])
            raise InvalidRequest(
                f"'{self._part[:80]}' is not a part of an adapter upload: use {known}",
                param=self._part[:80],
                code="unknown_parameter",
            )

    def _open_file(self, filename: str) -> None:
        if self._part == "weights" and filename.lower().endswith(_PICKLES):
            raise _invalid(
                "weights",
                f"'{filename[:80]}' is a pickle, which can run code: load the adapter with PEFT "
                "and save it with save_pretrained(..., safe_serialization=True)",
            )
        path = self._directory / FILE_PARTS[self._part]
        self._upload.files[self._part] = path
        self._file = path.open("xb")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_TEXT_BYTES:
            raise _invalid(
                self._part,
                f"part '{self._part}' exceeds {MAX_TEXT_BYTES} bytes: shorten it",
            )

    def _on_part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            return
        try:
            self._upload.texts[self._part] = self._text.decode()
        except UnicodeDecodeError:
            raise _invalid(self._part, f"part '{self._part}' is not UTF-8: encode it so") from None
        self._text.clear()

    def _on_end(self) -> None:
        self._is_complete = True


def _boundary(request: Request) -> bytes:
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    if content_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise _not_multipart(f"its content-type is {content_type.decode('latin-1')[:80]!r}")
    return options[b"boundary"]


def _not_multipart(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body is no complete multipart form ({why}): send multipart/form-data, for example "
        "with curl -F adapter_id=... -F config=@... -F weights=@...",
        code="invalid_multipart",
    )


def _invalid(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the upload exceeds {max_bytes} bytes, the server's max_upload_bytes: send a smaller "
        "adapter or raise the setting"
    )
