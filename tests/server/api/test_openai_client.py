"""The openai Python client, unchanged, over an in-process transport."""

from __future__ import annotations

import openai
import pytest


@pytest.fixture
def client(server):
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="any", http_client=server.client, max_retries=0
    )


def test_chats_with_an_adapter_as_model(client):
    answer = client.chat.completions.create(
        model="shout", messages=[{"role": "user", "content": "hi"}], temperature=0
    )
    assert answer.choices[0].message.content == "hello"
    assert answer.model == "shout"
    assert answer.adapter["version"] == 2
    assert answer.usage.completion_tokens == 6


def test_streams_with_an_adapter_id_and_usage(client):
    stream = client.chat.completions.create(
        model="tiny-base",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"adapter_id": "acme/json"},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens > 0
    assert all(chunk.adapter["id"] == "acme/json" for chunk in chunks)


def test_completes_with_logprobs(client):
    answer = client.completions.create(model="tiny-base", prompt="hi", logprobs=1, max_tokens=5)
    assert answer.choices[0].text == "hello"
    assert answer.choices[0].logprobs.tokens == list("hello")


def test_reads_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny-base",
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=1,
    )
    content = answer.choices[0].logprobs.content
    assert [token.top_logprobs[0].token for token in content] == list("hello")


def test_lists_models(client):
    assert [model.id for model in client.models.list()] == ["tiny-base", "acme/json", "shout"]
    assert client.models.retrieve("shout").owned_by == "manylora"


def test_raises_its_own_errors_with_our_code_and_parameter(client):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nope", messages=messages)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny-base", messages=messages, temperature=9)
    assert refused.value.param == "temperature"
    assert refused.value.request_id


def test_raises_on_an_error_inside_a_stream(client, server, kit):
    server.engine.script = kit.fails("engine_lost", "the engine was lost", after="he")
    stream = client.chat.completions.create(
        model="tiny-base", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="the engine was lost"):
        list(stream)
