"""What POST /v1/completions promises."""

from __future__ import annotations

import pytest


def test_continues_a_prompt_without_a_template(server):
    body = server.complete(prompt="Once").json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hello", "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    submit = server.engine.submits[0]
    assert bytes(submit.prompt_token_ids) == b"Once"
    assert submit.sampling.max_tokens == 16


def test_the_default_length_gives_way_to_the_context(server, kit):
    server.complete(prompt="x" * (kit.max_context - 5))
    assert server.engine.submits[0].sampling.max_tokens == 5


def test_streams_text_then_finish_reason_then_done(server, kit):
    chunks = kit.chunks_of(server.complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "hello"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
    ],
)
def test_takes_every_form_of_prompt(server, prompt, expected):
    body = server.complete(prompt=prompt).json()
    assert [bytes(s.prompt_token_ids) for s in server.engine.submits] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))


def test_choices_of_several_prompts_follow_each_other(server):
    server.complete(prompt=["a", "b"], n=2, seed=1)
    submits = server.engine.submits
    assert [bytes(s.prompt_token_ids) for s in submits] == [b"a", b"a", b"b", b"b"]
    assert [s.sampling.seed for s in submits] == [1, 2, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_lists_of_equal_length_with_offsets_into_the_text(server, kit, stream):
    server.engine.script = kit.says("hé")
    response = server.complete(logprobs=2, stream=stream)
    answers = kit.chunks_of(response) if stream else [response.json()]
    logprobs = [a["choices"][0]["logprobs"] for a in answers if a["choices"][0]["text"]]
    joined = {key: [x for each in logprobs for x in each[key]] for key in logprobs[0]}
    assert joined["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert joined["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert joined["text_offset"] == [0, 1, 1]
    assert joined["top_logprobs"][0] == {"h": -0.5, "i": -1.5}


def test_minus_infinity_is_written_as_a_number(server, kit):
    plain = kit.says("a")

    def script(request):
        for event in plain(request):
            if getattr(event, "logprobs", None):
                low = type(event.logprobs[0])(float("-inf"))
                event = type(event)(
                    request_id=event.request_id, token_ids=event.token_ids, logprobs=(low,)
                )
            yield event

    server.engine.script = script
    logprobs = server.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "no token"),
        ([97, 300], "300"),
        ([-1], "-1"),
        ([], "must be"),
        ([[]], "must be"),
        (["a", [97]], "must be"),
        ([True], "must be"),
        (5, "must be"),
        (None, "must be"),
    ],
)
def test_a_prompt_that_is_none_is_refused(server, kit, prompt, words):
    response = server.complete(prompt=prompt)
    kit.assert_error(response, 400, "invalid_value", "prompt", words)
    assert server.engine.submits == []


def test_more_completions_than_the_limit_are_refused_with_both_numbers(server, kit):
    response = server.complete(prompt=["a"] * 10, n=13)
    kit.assert_error(response, 400, "invalid_value", "n", "130", "128")
