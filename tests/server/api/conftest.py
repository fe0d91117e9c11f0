"""The real app on a scripted engine and a real adapter store, without a model."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save
from starlette.testclient import TestClient
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.config import Settings
from server.engine.request import (
    AdapterImage,
    Dropped,
    Finished,
    Load,
    Started,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
from server.text.tokenizer import Tokenizer

MODEL = "tiny-base"
MAX_CONTEXT = 100
HIDDEN = 8
LAYOUT = BaseLayout(
    MODEL, 1, tuple(TargetShape(name, HIDDEN, HIDDEN) for name in TARGET_PATHS), 256, "float32"
)
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with a user') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)

STARTED = Started(num_pages=9, page_bytes=1, num_slots=4, max_context=1000)

Step = TokenEvent | Finished | asyncio.Event


@dataclass
class ScriptedEngine:
    """Plays `script` for each Submit; an event in it is waited for. Records what it is told."""

    script: Callable[[Submit], Iterable[Step]]
    started: Started | None = STARTED
    load: Load | None = None
    submits: list[Submit] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    preloads: list[AdapterImage] = field(default_factory=list)
    drops: list[tuple[str, bool]] = field(default_factory=list)

    async def generate(self, request: Submit) -> AsyncGenerator[TokenEvent | Finished, None]:
        self.submits.append(request)
        has_finished = False
        try:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                await asyncio.sleep(0)
                has_finished = isinstance(step, Finished)
                yield step
        finally:
            if not has_finished:
                self.cancelled.append(request.request_id)

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def preload(self, adapter: AdapterImage) -> None:
        self.preloads.append(adapter)

    async def drop(self, digest: str, abort: bool = False) -> Dropped:
        self.drops.append((digest, abort))
        return Dropped(digest=digest, freed_bytes=512)


def digest_of(request: Submit) -> str | None:
    return request.adapter.digest if request.adapter else None


def logprobs_of(request: Submit, token_id: int) -> tuple[TokenLogprobs, ...] | None:
    """The chosen token first, the ids after it as the next most probable ones."""
    wanted = request.sampling.num_logprobs
    if wanted is None:
        return None
    ids = tuple(range(token_id, token_id + wanted))
    return (TokenLogprobs(-0.5, ids, tuple(-0.5 - i for i in range(wanted))),)


def says(text: str, reason: str = "stop") -> Callable[[Submit], Iterable[Step]]:
    """Each byte of `text` is a token; one event for each, then the end."""

    def script(request: Submit) -> Iterable[Step]:
        token_ids = list(text.encode())
        for token_id in token_ids:
            yield TokenEvent(
                request_id=request.request_id,
                token_ids=(token_id,),
                logprobs=logprobs_of(request, token_id),
                adapter_digest=digest_of(request),
            )
        yield Finished(
            request_id=request.request_id,
            reason=reason,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_completion_tokens=len(token_ids) + (reason == "stop"),
            adapter_digest=digest_of(request),
        )

    return script


def fails(code: str, message: str, after: str = "") -> Callable[[Submit], Iterable[Step]]:
    def script(request: Submit) -> Iterable[Step]:
        yield from list(says(after)(request))[:-1]
        yield Finished(
            request_id=request.request_id, reason="error", error=message, error_code=code
        )

    return script


def byte_tokenizer() -> Tokenizer:
    """Token ids 0–255 are the bytes; 256 ends a text."""
    char_of_byte = {byte: char for char, byte in _byte_table().items()}
    vocab = {char_of_byte[byte]: byte for byte in range(256)}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    hf.chat_template = TEMPLATE
    return Tokenizer(hf)


def _byte_table() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


def adapter_files(seed: int, *, rank: int = 2, nan: bool = False) -> dict[str, bytes]:
    """An adapter as PEFT saves it; other seeds, other weights."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": MODEL,
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    random = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a = random.standard_normal((rank, HIDDEN), dtype=np.float32)
    b = random.standard_normal((HIDDEN, rank), dtype=np.float32)
    if nan:
        a[0, 0] = np.nan
    weights = save({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b})
    return {"config": json.dumps(config).encode(), "weights": weights}


def parts(files: dict[str, bytes]) -> dict[str, tuple[str, io.BytesIO]]:
    """Files as the test client sends them."""
    return {name: (name, io.BytesIO(content)) for name, content in files.items()}


def add_adapter(store: AdapterStore, adapter_id: str, seed: int) -> str:
    """Admit an adapter; its digest."""
    with store.staging() as staging:
        files = adapter_files(seed)
        (staging / "adapter_config.json").write_bytes(files["config"])
        (staging / "adapter_model.safetensors").write_bytes(files["weights"])
        return store.add(adapter_id, staging).digest


@dataclass
class Server:
    """One app under test, with what stands behind it."""

    client: TestClient
    engine: ScriptedEngine
    store: AdapterStore
    data_dir: Path

    def chat(self, **body):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, **body):
        return self.client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **body})

    def upload(self, adapter_id: str, seed: int, **fields: str):
        return self.client.post(
            "/v1/adapters",
            data={"adapter_id": adapter_id, **fields},
            files=parts(adapter_files(seed)),
        )


def chunks_of(response) -> list[dict]:
    """The events of a stream, which must end as one does."""
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def assert_error(response, status: int, code: str, param: str | None, *words: str) -> dict:
    """An error object with all four keys, the code, the parameter, and words in its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    for word in words:
        assert word in error["message"]
    assert response.headers["x-request-id"]
    return error


def make_server(store: AdapterStore, data_dir: Path, **settings) -> Iterator[Server]:
    engine = ScriptedEngine(says("hello"))
    app = create_app(
        settings=Settings(data_dir=data_dir, **settings),
        engine=engine,
        store=store,
        tokenizer=byte_tokenizer(),
        model_name=MODEL,
        max_context=MAX_CONTEXT,
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Server(client, engine, store, data_dir)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions above for the tests, which cannot import this file."""
    return SimpleNamespace(
        model=MODEL,
        max_context=MAX_CONTEXT,
        says=says,
        fails=fails,
        chunks_of=chunks_of,
        assert_error=assert_error,
        adapter_files=adapter_files,
        parts=parts,
        add_adapter=add_adapter,
    )


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory) -> Iterator[AdapterStore]:
    """Holds 'shout' in two versions and 'acme/json'; tests do not change it."""
    store = AdapterStore(tmp_path_factory.mktemp("shared"), LAYOUT, max_rank=8, max_pages=None)
    for adapter_id, seed in (("shout", 1), ("shout", 2), ("acme/json", 3)):
        add_adapter(store, adapter_id, seed)
    yield store
    store.close()


@pytest.fixture
def server(shared_store, tmp_path) -> Iterator[Server]:
    """For generation: adapters are there and stay."""
    yield from make_server(shared_store, tmp_path)


@pytest.fixture
def own_server(tmp_path) -> Iterator[Server]:
    """For adapter routes: an empty store of its own, and a small upload limit."""
    store = AdapterStore(tmp_path, LAYOUT, max_rank=8, max_pages=None)
    yield from make_server(store, tmp_path, max_upload_bytes=100_000)
    store.close()
