"""Every fault has its status, code and parameter, and a message that helps."""

from __future__ import annotations

import pytest

from server.errors import ANSWERS, InternalError, answer_for, error_with_code


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"temperature": 3}, "invalid_value", "temperature", ("3", "2")),
        ({"temperature": -0.1}, "invalid_value", "temperature", ("-0.1", "0")),
        ({"temperature": "hot"}, "invalid_type", "temperature", ("'hot'", "number")),
        ({"temperature": True}, "invalid_type", "temperature", ("true",)),
        ({"top_p": 0}, "invalid_value", "top_p", ("0",)),
        ({"top_p": 1.5}, "invalid_value", "top_p", ("1",)),
        ({"top_k": -2}, "invalid_value", "top_k", ("-2", "-1")),
        ({"min_p": 2}, "invalid_value", "min_p", ("1",)),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", ("0", "1")),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens", ("1.5",)),
        ({"seed": 2**63}, "invalid_value", "seed", (str(2**63),)),
        ({"n": 17}, "invalid_value", "n", ("17", "16")),
        ({"n": 0}, "invalid_value", "n", ("1",)),
        ({"stop": ["a"] * 17}, "invalid_value", "stop", ("16",)),
        ({"stop": ""}, "invalid_value", "stop[0]", ("1",)),
        ({"stop": 5}, "invalid_type", "stop", ("5",)),
        ({"stop": ["a", 5]}, "invalid_type", "stop[1]", ("5",)),
        ({"stream": "yes"}, "invalid_type", "stream", ("'yes'",)),
        ({"stream_options": {"x": 1}}, "unknown_parameter", "stream_options.x", ()),
        ({"temprature": 1}, "unknown_parameter", "temprature", ("spelling",)),
        ({"model": 5}, "invalid_type", "model", ("5",)),
        ({"adapter_id": ["a"]}, "invalid_type", "adapter_id", ()),
    ],
)
def test_a_parameter_out_of_range_is_named_with_value_and_limit(
    server, kit, fields, code, param, words
):
    kit.assert_error(server.chat(**fields), 400, code, param, *words)
    kit.assert_error(server.complete(**fields), 400, code, param, *words)
    assert server.engine.submits == []


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "invalid_value",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "weight": 1}]},
            "unknown_parameter",
            "messages[0].weight",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "chat_template_error", "messages"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "invalid_value", "max_tokens"),
        ({"prompt": "x"}, "unknown_parameter", "prompt"),
    ],
)
def test_a_chat_body_that_makes_no_sense_is_refused(server, kit, fields, code, param):
    kit.assert_error(server.chat(**fields), 400, code, param)
    assert server.engine.submits == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("frequency_penalty", False),
        ("suffix", "end"),
        ("best_of", 2),
        ("echo", True),
        ("reasoning_effort", "high"),
        ("modalities", ["audio"]),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(server, kit, name, value):
    for response in (server.chat(**{name: value}), server.complete(**{name: value})):
        kit.assert_error(response, 400, "unsupported_parameter", name, name, "leave it out")


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"5", b'"x"', b'{"model": "\xff"}', b'{"temperature": NaN}', b"[" * 5000],
)
def test_a_body_that_is_no_json_object_is_refused(server, kit, route, raw):
    kit.assert_error(server.client.post(route, content=raw), 400, "invalid_json", None)


def test_a_body_of_unbounded_size_is_refused_with_the_limit(server, kit):
    raw = b'{"prompt": "' + b"x" * (33 << 20)
    response = server.client.post("/v1/completions", content=raw)
    kit.assert_error(response, 413, "payload_too_large", None, str(32 << 20))


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(server, kit):
    response = server.complete(prompt="x" * 100)
    kit.assert_error(response, 400, "context_length_exceeded", "prompt", "100 tokens", "holds 100")
    messages = [{"role": "user", "content": "x" * 200}]
    response = server.chat(messages=messages, stream=True)
    kit.assert_error(response, 400, "context_length_exceeded", "messages", "217", "100")


def test_more_tokens_than_the_context_has_left_are_refused_with_what_is_left(server, kit):
    response = server.complete(prompt="x" * 90, max_tokens=11)
    kit.assert_error(
        response, 400, "context_length_exceeded", "max_tokens", "90", "11", "100", "to 10 or less"
    )
    response = server.chat(max_completion_tokens=1000)
    kit.assert_error(response, 400, "context_length_exceeded", "max_completion_tokens", "1000")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("engine_lost", 503),
        ("overloaded", 429),
        ("context_length_exceeded", 400),
        ("adapter_refused", 422),
        ("internal_error", 500),
        ("never heard of", 500),
    ],
)
def test_an_early_fault_of_the_engine_gets_its_status(server, kit, code, status, stream):
    server.engine.script = kit.fails(code, "what happened")
    response = server.chat(stream=stream)
    wanted = "internal_error" if code == "never heard of" else code
    kit.assert_error(response, status, wanted, None, "what happened")
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_late_fault_of_the_engine_is_one_line_of_the_stream_and_the_status_without(server, kit):
    server.engine.script = kit.fails("engine_lost", "the engine was lost", after="he")
    chunks = kit.chunks_of(server.chat(stream=True))
    assert chunks[-1] == {
        "error": {
            "message": "the engine was lost",
            "type": "server_error",
            "param": None,
            "code": "engine_lost",
        }
    }
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "he"
    kit.assert_error(server.chat(), 503, "engine_lost", None)


def test_one_failed_choice_fails_the_request_and_cancels_the_others(server, kit):
    good, bad = kit.says("long text"), kit.fails("engine_lost", "gone")

    def script(request):
        return bad(request) if request.request_id.endswith("-1") else good(request)

    server.engine.script = script
    kit.assert_error(server.chat(n=3), 503, "engine_lost", None, "gone")
    names = {submit.request_id for submit in server.engine.submits}
    assert {name[-2:] for name in names} == {"-0", "-1", "-2"}
    assert {name[-2:] for name in server.engine.cancelled} == {"-0", "-2"}


def test_a_request_whose_adapter_was_deleted_under_it_is_gone(server, kit):
    server.engine.script = kit.says("x", reason="cancelled")
    kit.assert_error(server.chat(adapter_id="shout"), 410, "request_cancelled", None, "shout")


def test_an_engine_that_ends_without_a_final_event_is_an_error(server, kit):
    server.engine.script = lambda request: list(kit.says("x")(request))[:-1]
    kit.assert_error(server.chat(), 500, "internal_error", None)


def test_while_the_engine_starts_requests_are_told_to_try_again(server, kit):
    server.engine.started = None
    response = server.chat()
    kit.assert_error(response, 503, "engine_unavailable", None, "starting")
    assert int(response.headers["retry-after"]) > 0
    kit.assert_error(server.complete(), 503, "engine_unavailable", None)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "unknown_url"),
        ("POST", "/v1/nope", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/openapi.json", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/adapters", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("GET", "/v1/adapters/nope", 404, "model_not_found"),
        ("DELETE", "/v1/adapters/nope", 404, "model_not_found"),
    ],
)
def test_routes_and_names_that_are_not_there_answer_with_an_error_object(
    server, kit, method, path, status, code
):
    response = server.client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    if status == 405:
        assert response.headers["allow"]


def test_a_method_that_is_not_there_is_answered_with_those_that_are(server, kit):
    response = server.client.get("/v1/completions")
    kit.assert_error(response, 405, "method_not_allowed", None, "POST")


def test_a_query_parameter_out_of_range_is_named(server, kit):
    response = server.client.delete("/v1/adapters/shout?mode=now")
    kit.assert_error(response, 400, "invalid_value", "mode", "'now'", "drain")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_fault_is_a_500_that_the_log_explains(server, kit, caplog, stream):
    def script(request):
        raise RuntimeError("secret detail")
        yield

    server.engine.script = script
    response = server.client.post(
        "/v1/completions",
        json={"model": "tiny-base", "prompt": "x", "stream": stream},
        headers={"x-request-id": "mine-1"},
    )
    error = kit.assert_error(response, 500, "internal_error", None, "mine-1")
    assert "secret" not in error["message"]
    assert "mine-1" in caplog.text
    assert "secret detail" in caplog.text


def test_an_unforeseen_fault_in_a_stream_is_one_line_of_it(server, kit, caplog):
    def script(request):
        yield from list(kit.says("he")(request))[:-1]
        raise RuntimeError("secret detail")

    server.engine.script = script
    chunks = kit.chunks_of(server.chat(stream=True))
    assert chunks[-1]["error"]["code"] == "internal_error"
    assert "secret" not in chunks[-1]["error"]["message"]
    assert "secret detail" in caplog.text


def test_codes_of_the_table_lead_back_to_their_errors():
    for error, answer in ANSWERS.items():
        assert type(error_with_code(answer.code, "x")) is error
        assert answer_for(error) == answer
    assert type(error_with_code(None, "x")) is InternalError


def test_every_answer_carries_the_callers_request_id_or_a_new_one(server):
    def ids(given):
        headers = {"x-request-id": given} if given else {}
        for path in ("/health", "/nope", "/v1/models"):
            yield server.client.get(path, headers=headers).headers["x-request-id"]

    assert set(ids("abc-1.2:3")) == {"abc-1.2:3"}
    for unsound in ("", "a b", "x" * 129, "ü".encode("latin-1")):
        fresh = list(ids(unsound))
        assert len(set(fresh)) == 3
        assert all(each.startswith("req-") for each in fresh)
    stream = server.chat(stream=True)
    assert stream.headers["x-request-id"].startswith("req-")
