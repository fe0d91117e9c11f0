"""Which adapter answers, and how the answer says so."""

from __future__ import annotations

import pytest

from server.engine.request import Finished, TokenEvent


def applied(response):
    """The adapter as headers and body say; both must agree."""
    body = response.json()
    headers = response.headers
    given = body["adapter"]
    assert headers["x-manylora-adapter"] == given["id"]
    assert headers["x-manylora-adapter-version"] == str(given["version"])
    assert headers["x-manylora-adapter-digest"] == given["digest"]
    assert body["model"] == given["id"]
    return given["id"], given["version"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "shout"}, ("shout", 2)),
        ({"model": "shout@1"}, ("shout", 1)),
        ({"model": "tiny-base:shout@1"}, ("shout", 1)),
        ({"model": "acme/json"}, ("acme/json", 1)),
        ({"model": "tiny-base:acme/json"}, ("acme/json", 1)),
        ({"adapter_id": "shout"}, ("shout", 2)),
        ({"adapter_id": "shout@1", "model": None}, ("shout", 1)),
        ({"adapter_id": "acme/json", "model": "acme/json@1"}, ("acme/json", 1)),
    ],
)
def test_a_request_names_its_adapter_by_model_or_adapter_id(server, fields, expected):
    assert applied(server.chat(**fields)) == expected
    assert applied(server.complete(**fields)) == expected


def test_a_digest_names_a_version(server, shared_store):
    digest = shared_store.resolve("shout@1").digest
    assert applied(server.chat(model=f"shout@sha256:{digest}")) == ("shout", 1)
    assert applied(server.chat(adapter_id=f"shout@sha256:{digest[:12]}")) == ("shout", 1)


def test_the_engine_gets_the_image_of_the_version_asked_for(server, shared_store):
    server.chat(adapter_id="shout@1")
    image = server.engine.submits[0].adapter
    version = shared_store.resolve("shout@1")
    assert image.digest == version.digest
    assert image.path == str(shared_store.image(version))


def test_every_chunk_of_a_stream_says_what_was_applied(server, kit):
    response = server.chat(adapter_id="shout", stream=True, stream_options={"include_usage": True})
    adapters = [chunk["adapter"] for chunk in kit.chunks_of(response)]
    assert all(adapter == adapters[0] for adapter in adapters)
    assert response.headers["x-manylora-adapter-digest"] == adapters[0]["digest"]
    assert (adapters[0]["id"], adapters[0]["version"]) == ("shout", 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nope"}, "model"),
        ({"model": "shout@9"}, "model"),
        ({"model": "other-base:shout"}, "model"),
        ({"model": "tiny-base:"}, "model"),
        ({"model": ""}, "model"),
        ({"model": "../etc"}, "model"),
        ({"adapter_id": "nope"}, "adapter_id"),
        ({"adapter_id": "tiny-base"}, "adapter_id"),
        ({"model": "nope", "adapter_id": "shout"}, "model"),
        ({"model": "shout@sha256:000000000000"}, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_name_is_404_and_never_the_bases_answer(server, kit, fields, param, stream):
    name = fields[param][:20]
    kit.assert_error(server.chat(**fields, stream=stream), 404, "model_not_found", param, name)
    kit.assert_error(server.complete(**fields, stream=stream), 404, "model_not_found", param)
    assert server.engine.submits == []


def test_two_names_for_different_adapters_are_refused(server, kit):
    response = server.chat(model="shout", adapter_id="acme/json")
    kit.assert_error(response, 400, "invalid_value", "adapter_id", "shout@2", "acme/json@1")
    response = server.chat(model="shout@1", adapter_id="shout")
    kit.assert_error(response, 400, "invalid_value", "adapter_id", "shout@1", "shout@2")


def test_a_request_that_names_no_model_is_refused(server, kit):
    response = server.chat(model=None)
    kit.assert_error(response, 400, "missing_required_parameter", "model", "tiny-base")


@pytest.mark.parametrize("fields", [{}, {"adapter_id": "shout"}])
@pytest.mark.parametrize("at", ["token", "end"])
def test_another_adapter_than_the_one_asked_for_is_an_error_never_an_answer(
    server, kit, fields, at
):
    wrong = "f" * 64

    def script(request):
        if at == "token":
            yield TokenEvent(request_id=request.request_id, token_ids=(65,), adapter_digest=wrong)
        yield Finished(
            request_id=request.request_id, reason="stop", num_completion_tokens=1,
            adapter_digest=wrong,
        )  # fmt: skip

    server.engine.script = script
    for stream in (False, True):
        response = server.chat(**fields, stream=stream)
        kit.assert_error(response, 500, "adapter_mismatch", None, wrong)


def test_base_weights_where_an_adapter_was_asked_for_are_an_error(server, kit):
    honest = kit.says("hello")

    def script(request):
        return honest(without_adapter(request))

    server.engine.script = script
    kit.assert_error(server.chat(adapter_id="shout"), 500, "adapter_mismatch", None)


def without_adapter(request):
    return type(request)(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
    )


def test_a_mismatch_in_the_middle_of_a_stream_ends_it_with_the_error(server, kit):
    def script(request):
        good = request.adapter.digest
        for digest in (good, good, "f" * 64):
            yield TokenEvent(request_id=request.request_id, token_ids=(65,), adapter_digest=digest)

    server.engine.script = script
    chunks = kit.chunks_of(server.chat(adapter_id="shout", stream=True))
    assert chunks[-1]["error"]["code"] == "adapter_mismatch"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == "AA"
