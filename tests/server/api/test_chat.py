"""What POST /v1/chat/completions promises."""

from __future__ import annotations

import pytest


def test_answers_with_the_base_model(server):
    response = server.chat()
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny-base"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "finish_reason": "stop",
        }
    ]
    prompt_tokens = len("[user]hi[assistant]")
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 6,
        "total_tokens": prompt_tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert "adapter" not in body
    assert response.headers["x-manylora-model"] == "tiny-base"
    assert not [name for name in response.headers if name.startswith("x-manylora-adapter")]


def test_streams_role_text_and_finish_reason_then_done(server, kit):
    chunks = kit.chunks_of(server.chat(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello"
    assert deltas[-1] == {}
    assert [c["choices"][0].get("finish_reason") for c in chunks][-2:] == [None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_include_usage_adds_one_chunk_without_choices(server, kit):
    chunks = kit.chunks_of(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_parameters_reach_the_engine_as_given(server):
    server.chat(
        max_tokens=7, temperature=0, top_p=0.5, top_k=3, min_p=0.25, seed=11, ignore_eos=True
    )
    sampling = server.engine.submits[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (7, 0.0, 11)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 3, 0.25)
    assert sampling.stop_token_ids == ()
    assert sampling.num_logprobs is None


def test_defaults_are_openais_with_the_rest_of_the_context(server, kit):
    server.chat(temperature=None, stop=None, n=None)
    submit = server.engine.submits[0]
    assert submit.sampling.temperature == 1.0
    assert submit.sampling.max_tokens == kit.max_context - len(submit.prompt_token_ids)
    assert submit.sampling.stop_token_ids == (256,)


def test_the_pool_may_allow_less_context_than_the_model(server):
    server.engine.started = type(server.engine.started)(
        num_pages=1, page_bytes=1, num_slots=1, max_context=30
    )
    server.chat()
    assert server.engine.submits[0].sampling.max_tokens == 30 - len("[user]hi[assistant]")


def test_choices_are_requests_of_their_own_with_successive_seeds(server):
    body = server.chat(n=3, seed=5).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [submit.sampling.seed for submit in server.engine.submits] == [5, 6, 7]
    assert len({submit.request_id for submit in server.engine.submits}) == 3
    assert body["usage"]["completion_tokens"] == 18
    assert body["usage"]["prompt_tokens"] == len("[user]hi[assistant]")


def test_streamed_choices_are_told_apart_by_index(server, kit):
    chunks = kit.chunks_of(server.chat(n=2, stream=True))
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "hello"
        assert own[-1]["finish_reason"] == "stop"


def test_text_parts_and_the_developer_role_reach_the_template(server):
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": content}]
    server.chat(messages=messages)
    prompt = bytes(server.engine.submits[0].prompt_token_ids).decode()
    assert prompt == "[system]be kind[user]one\ntwo[assistant]"


def test_an_answer_can_be_sent_back_as_it_came(server):
    answered = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}
    messages = [{"role": "user", "content": "a"}, answered, {"role": "user", "content": "b"}]
    assert server.chat(messages=messages).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_cancels_the_rest(server, kit, stream):
    server.engine.script = kit.says("one END two", reason="length")
    response = server.chat(stop=["END"], stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in kit.chunks_of(response)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        choices = response.json()["choices"]
        text = choices[0]["message"]["content"]
        assert response.json()["usage"]["completion_tokens"] == len("one END")
    assert (text, choices[-1]["finish_reason"]) == ("one ", "stop")
    assert server.engine.cancelled == [server.engine.submits[0].request_id]


def test_running_out_of_tokens_is_finish_reason_length(server, kit):
    server.engine.script = kit.says("hel", reason="length")
    assert server.chat(max_tokens=3).json()["choices"][0]["finish_reason"] == "length"


def test_a_character_spread_over_tokens_arrives_whole(server, kit):
    server.engine.script = kit.says("a🦜b")
    deltas = [c["choices"][0]["delta"] for c in kit.chunks_of(server.chat(stream=True))]
    assert [d["content"] for d in deltas if d.get("content")] == ["a", "🦜", "b"]


def test_an_empty_completion_is_an_empty_text(server, kit):
    server.engine.script = kit.says("")
    assert server.chat().json()["choices"][0]["message"]["content"] == ""
    deltas = [c["choices"][0]["delta"] for c in kit.chunks_of(server.chat(stream=True))]
    assert deltas == [{"role": "assistant", "content": ""}, {}]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_one_entry_for_each_token_of_the_text(server, kit, stream):
    server.engine.script = kit.says("é!")
    response = server.chat(logprobs=True, top_logprobs=2, stream=stream)
    choices = (
        [chunk["choices"][0] for chunk in kit.chunks_of(response)]
        if stream
        else response.json()["choices"]
    )
    content = [t for c in choices if "logprobs" in c for t in c["logprobs"]["content"]]
    assert [token["bytes"] for token in content] == [[0xC3], [0xA9], [0x21]]
    assert [token["token"] for token in content] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert content[2]["logprob"] == -0.5
    assert [top["token"] for top in content[2]["top_logprobs"]] == ["!", '"']
    assert [top["logprob"] for top in content[2]["top_logprobs"]] == [-0.5, -1.5]


def test_logprobs_without_top_are_of_the_chosen_tokens_only(server):
    content = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[]] * 5
    assert server.engine.submits[0].sampling.num_logprobs == 0


def test_parameters_that_change_nothing_are_taken(server):
    response = server.chat(
        user="u", store=False, metadata={"a": "b"}, service_tier="auto", tools=[], tool_choice=None,
        response_format={"type": "text"}, logit_bias={}, presence_penalty=0.0, frequency_penalty=0,
        parallel_tool_calls=True, modalities=["text"],
    )  # fmt: skip
    assert response.status_code == 200
