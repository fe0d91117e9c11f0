"""An engine in this process on a real checkpoint, and transformers + PEFT as its oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.store import AdapterStore
from server.config import Settings
from server.engine.loop import EngineLoop
from server.engine.process import build_engine
from server.engine.request import (
    AdapterImage,
    AdapterPart,
    Cancel,
    Finished,
    Load,
    Sampling,
    Submit,
    TokenEvent,
    TokenLogprobs,
    combination,
)
from server.engine.spec import EngineSpec, engine_spec

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

RECIPES: dict[str, dict[str, Any]] = {
    "rank-1": {"r": 1, "lora_alpha": 4, "target_modules": ALL},
    "rank-2-attention": {"r": 2, "lora_alpha": 8, "target_modules": ALL[:4]},
    "rank-4-qv": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank-6-mlp": {"r": 6, "lora_alpha": 12, "target_modules": ALL[4:]},
    "rank-8": {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    "rank-8-down": {"r": 8, "lora_alpha": 8, "target_modules": ["down_proj"]},
    "rank-16-all-linear": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "rank-16-rslora": {"r": 16, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
    "rank-17": {"r": 17, "lora_alpha": 17, "target_modules": ALL},
    "rank-32-layer-0": {
        "r": 32,
        "lora_alpha": 64,
        "target_modules": ALL,
        "layers_to_transform": [0],
    },
    "rank-64": {"r": 64, "lora_alpha": 64, "target_modules": ALL},
    "rank-pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 24, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"q_proj": 12, "up_proj": 40},
    },
    "regex": {"r": 5, "lora_alpha": 10, "target_modules": r".*\.(o|up)_proj"},
}
"""PEFT settings of the adapters of the truth tests: ranks 1 to 64, mixed in every way."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass
class ListPost:
    """The engine's mailbox as two lists."""

    inbox: list[Any] = field(default_factory=list)
    outbox: list[Any] = field(default_factory=list)

    def receive(self, wait: bool) -> list[Any]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, messages: Sequence[Any]) -> None:
        self.outbox += messages

    def wake(self) -> None:
        """Nobody waits: the harness turns the loop until everything has ended."""


@dataclass
class Outcome:
    """What the engine said of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    digests: set[str | None] = field(default_factory=set)
    finished: list[Finished] = field(default_factory=list)

    @property
    def answer(self) -> Answer:
        return Answer(self.token_ids, [entry.chosen for entry in self.logprobs])


class Harness:
    """One engine and one store; requests are submitted at chosen turns of the loop."""

    def __init__(self, spec: EngineSpec, loop: EngineLoop, post: ListPost, store: AdapterStore):
        self.spec = spec
        self.store = store
        self.outcomes: dict[str, Outcome] = {}
        self._loop = loop
        self._post = post
        self._ids = map(str, itertools.count())

    def add(self, adapter_id: str, directory: Path) -> str:
        """Upload an adapter; its digest."""
        return self.store.add(adapter_id, directory).digest

    def image(self, adapter_id: str | Mapping[str, float]) -> AdapterImage:
        """What a Submit for it has to carry."""
        if not isinstance(adapter_id, str):
            parts = [AdapterPart(self.image(each), w) for each, w in adapter_id.items()]
            return combination(parts)
        version = self.store.resolve(adapter_id)
        return AdapterImage(version.digest, str(self.store.image(version)))

    def submit(
        self,
        prompt: Sequence[int],
        adapter_id: str | Mapping[str, float] | None = None,
        num_tokens: int = 12,
        salt: str = "",
    ) -> str:
        """Ask for a greedy completion; the request's id. A mapping is a combination by weights."""
        image = self.image(adapter_id) if adapter_id is not None else None
        request_id = next(self._ids)
        sampling = Sampling(max_tokens=num_tokens, temperature=0.0, num_logprobs=1)
        self._post.inbox.append(
            Submit(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
                adapter=image,
                cache_salt=salt,
            )
        )
        self.outcomes[request_id] = Outcome()
        return request_id

    def cancel(self, request_id: str) -> None:
        self._post.inbox.append(Cancel(request_id=request_id))

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self._loop.turn()
        messages, self._post.outbox = self._post.outbox, []
        for message in messages:
            if isinstance(message, TokenEvent):
                outcome = self.outcomes[message.request_id]
                outcome.token_ids += message.token_ids
                outcome.logprobs += message.logprobs or ()
                outcome.digests.add(message.adapter_digest)
            elif isinstance(message, Finished):
                self.outcomes[message.request_id].finished.append(message)

    def run(self) -> dict[str, Outcome]:
        """Turn until every request has ended, once."""
        while not all(outcome.finished for outcome in self.outcomes.values()):
            self.turn()
        self.turn(2)
        assert all(len(outcome.finished) == 1 for outcome in self.outcomes.values())
        return self.outcomes

    def report(self) -> Load:
        return self._loop._report()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama with grouped-query heads, as transformers saves it."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=320, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        initializer_range=0.25, tie_word_embeddings=False, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_adapter(model: Any, directory: Path, seed: int, size: float, **recipe: Any) -> Path:
    """Save a PEFT adapter whose A and B are random, B of standard deviation `size`."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **recipe))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    peft_model.save_pretrained(directory, save_embedding_layers=False)
    peft_model.unload()
    return directory


class Oracle:
    """transformers + PEFT, one request at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._known_deltas: dict[Path, dict[str, torch.Tensor]] = {}

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], adapter: Path | None, num_tokens: int = 12) -> Answer:
        """The greedy answer of the model with the adapter in a directory."""
        model = self.model
        if adapter is not None:
            model = PeftModel.from_pretrained(self.model, adapter).eval()
        try:
            return _greedy(model, prompt, num_tokens)
        finally:
            if adapter is not None:
                model.unload()

    @torch.inference_mode()
    def answer_of_sum(
        self, prompt: Sequence[int], weights: Mapping[Path, float], num_tokens: int = 12
    ) -> Answer:
        """The greedy answer of W + the weighted sum of the dense deltas that PEFT computes.

        weights: by the adapter's directory.
        """
        before: dict[str, torch.Tensor] = {}
        for adapter, weight in weights.items():
            for name, delta in self._deltas(adapter).items():
                parameter = self.model.get_submodule(name).weight
                before.setdefault(name, parameter.clone())
                parameter += weight * delta
        try:
            return _greedy(self.model, prompt, num_tokens)
        finally:
            for name, parameter in before.items():
                self.model.get_submodule(name).weight.copy_(parameter)

    def _deltas(self, adapter: Path) -> dict[str, torch.Tensor]:
        """The delta of each layer that the adapter changes, [out, in]."""
        if adapter not in self._known_deltas:
            self._known_deltas[adapter] = self._read_deltas(adapter)
        return self._known_deltas[adapter]

    def _read_deltas(self, adapter: Path) -> dict[str, torch.Tensor]:
        model = PeftModel.from_pretrained(self.model, adapter).eval()
        try:
            return {
                name.removeprefix("base_model.model."): module.get_delta_weight("default").clone()
                for name, module in model.named_modules()
                if hasattr(module, "get_delta_weight")
            }
        finally:
            model.unload()

    @torch.inference_mode()
    def logprobs(
        self, prompt: Sequence[int], adapter: Path | None, token_ids: Sequence[int]
    ) -> list[float]:
        """Log-probabilities of given tokens after the prompt."""
        model = self.model
        if adapter is not None:
            model = PeftModel.from_pretrained(self.model, adapter).eval()
        try:
            ids = torch.tensor([[*prompt, *token_ids]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])
            return chosen[:, 0].tolist()
        finally:
            if adapter is not None:
                model.unload()


def _greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> Answer:
    ids, cache = torch.tensor([list(prompt)]), None
    token_ids, logprobs = [], []
    for _ in range(num_tokens):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache, scores = output.past_key_values, output.logits[0, -1].float().log_softmax(-1)
        token_ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        ids = torch.tensor([token_ids[-1:]])
    return Answer(token_ids, logprobs)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_model) -> Oracle:
    return Oracle(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))


@pytest.fixture(scope="session")
def tiny_adapters(tiny_oracle, tmp_path_factory) -> dict[str, Path]:
    """One adapter for each recipe, strong enough to change the answers."""
    root = tmp_path_factory.mktemp("tiny-adapters")
    return {
        name: make_adapter(tiny_oracle.model, root / name, seed, 0.3, **recipe)
        for seed, (name, recipe) in enumerate(RECIPES.items())
    }


@pytest.fixture
def make_harness(tmp_path) -> Iterator[Callable[..., Harness]]:
    """Build an engine for a model directory; keyword arguments are settings."""
    open_stores: list[AdapterStore] = []
    loops: list[EngineLoop] = []

    def build(model: Path | str, **settings: Any) -> Harness:
        data_dir = tmp_path / f"data-{len(open_stores)}"
        spec = engine_spec(Settings(model=str(model), device="cpu", data_dir=data_dir, **settings))
        post = ListPost()
        loop, _ = build_engine(spec, post)
        loops.append(loop)
        store = AdapterStore(data_dir, spec.layout, max_rank=spec.max_adapter_rank, max_pages=None)
        open_stores.append(store)
        return Harness(spec, loop, post, store)

    yield build
    for loop in loops:
        loop.close()
    for store in open_stores:
        with closing(store):
            pass


@pytest.fixture(scope="session")
def adapter_maker() -> Callable[..., Path]:
    return make_adapter


@pytest.fixture(scope="session")
def oracle_class() -> type[Oracle]:
    return Oracle


@pytest.fixture(scope="session")
def recipes() -> dict[str, dict[str, Any]]:
    return RECIPES
