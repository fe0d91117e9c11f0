"""What the prefix cache spared a request, in its usage; and the salt that keeps tenants apart."""

from __future__ import annotations

import pytest

from server.engine.request import Finished, Submit, TokenEvent


def caches(numbers, *, text: str = "hello"):
    """A script whose k-th Submit found `numbers[k]` of its prompt's tokens."""
    left = iter(numbers)

    def script(request: Submit):
        num_cached = next(left)
        for token_id in text.encode():
            yield TokenEvent(
                request_id=request.request_id, token_ids=(token_id,), num_cached_tokens=num_cached
            )
        yield Finished(
            request_id=request.request_id,
            reason="length",
            num_prompt_tokens=len(request.prompt_token_ids),
            num_completion_tokens=len(text),
            num_cached_tokens=num_cached,
        )

    return script


def cached(usage: dict) -> int:
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}
    return usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_the_usage_says_how_much_of_the_prompt_was_cached(server, kit, route):
    server.engine.script = caches([16])
    assert cached(getattr(server, route)().json()["usage"]) == 16
    server.engine.script = caches([8])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = kit.chunks_of(getattr(server, route)(**options))
    assert cached(chunks[-1]["usage"]) == 8


def test_it_says_so_where_a_stop_string_ended_the_answer(server):
    server.engine.script = caches([16])
    body = server.complete(stop="ll").json()
    assert body["choices"][0]["text"] == "he"
    assert cached(body["usage"]) == 16


def test_it_says_so_where_the_first_token_was_the_last(server):
    server.engine.script = caches([16], text="")
    assert cached(server.complete().json()["usage"]) == 16


def test_a_prompt_counts_once_and_by_the_choice_that_found_least(server):
    server.engine.script = caches([0, 16, 24, 32])
    body = server.complete(prompt=["a", "b"], n=2).json()
    assert len(body["choices"]) == 4
    assert cached(body["usage"]) == 0 + 24


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_the_salt_reaches_the_engine(server, route):
    getattr(server, route)(cache_salt="tenant-7")
    getattr(server, route)()
    getattr(server, route)(cache_salt=None)
    assert [submit.cache_salt for submit in server.engine.submits] == ["tenant-7", "", ""]


@pytest.mark.parametrize(
    ("salt", "code", "word"),
    [("x" * 257, "invalid_value", "256"), (7, "invalid_type", "string")],
)
def test_a_salt_that_is_none_is_refused_by_name(server, kit, salt, code, word):
    kit.assert_error(server.chat(cache_salt=salt), 400, code, "cache_salt", word)
    assert server.engine.submits == []
