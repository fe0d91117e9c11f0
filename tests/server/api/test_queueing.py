"""What a request says of its place in the queue, and how it is told that there is none."""

from __future__ import annotations

import pytest

from server.engine.request import Finished


@pytest.fixture
def with_settings(server):
    """Changes settings of the running app."""

    def change(**settings) -> None:
        state = server.client.app.state.server
        state.settings = state.settings.model_copy(update=settings)

    return change


def refuses(code: str, retry_after: int | None):
    def script(request):
        yield Finished(
            request_id=request.request_id,
            reason="error",
            error="what happened",
            error_code=code,
            retry_after=retry_after,
        )

    return script


def test_priority_and_patience_reach_the_engine_and_have_defaults(server):
    server.chat()
    server.complete(priority=-7, queue_timeout=2.5)
    first, second = server.engine.submits
    assert (first.priority, first.queue_timeout) == (0, 60.0)
    assert (second.priority, second.queue_timeout) == (-7, 2.5)


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"priority": 101}, "invalid_value", "priority", ("101", "100")),
        ({"priority": -101}, "invalid_value", "priority", ("-101", "-100")),
        ({"priority": "high"}, "invalid_type", "priority", ("'high'",)),
        ({"queue_timeout": 0}, "invalid_value", "queue_timeout", ("0",)),
        ({"queue_timeout": 61}, "invalid_value", "queue_timeout", ("61", "60", "lower")),
        ({"user": 5}, "invalid_type", "user", ("5",)),
        ({"user": "x" * 257}, "invalid_value", "user", ("256",)),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(server, kit, fields, code, param, words):
    kit.assert_error(server.chat(**fields), 400, code, param, *words)
    assert server.engine.submits == []


def test_without_a_limit_of_the_server_a_request_sets_its_own(server, with_settings):
    with_settings(queue_timeout=None)
    server.chat()
    server.chat(queue_timeout=1e6)
    assert [each.queue_timeout for each in server.engine.submits] == [None, 1e6]


@pytest.mark.parametrize(
    ("fairness", "user", "tenant", "weight"),
    [
        ("adapter", "ann", None, 2.0),
        ("user", "ann", "user:ann", 5.0),
        ("user", "bob", "user:bob", 1.0),
        ("user", None, None, 2.0),
        ("none", "ann", "", 1.0),
    ],
)
def test_fairness_decides_whose_service_it_is_and_which_weight_it_has(
    server, with_settings, fairness, user, tenant, weight
):
    with_settings(fairness=fairness, tenant_weights={"ann": 5.0, "shout": 2.0})
    server.chat(model="shout", user=user)
    (submit,) = server.engine.submits
    assert (submit.tenant, submit.weight) == (tenant, weight)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("code", ["queue_full", "queue_timeout"])
@pytest.mark.parametrize(("seconds", "told"), [(17, "17"), (None, "2")])
def test_a_request_without_a_place_is_told_when_to_try_again(
    server, kit, code, stream, seconds, told
):
    server.engine.script = refuses(code, seconds)
    response = server.chat(stream=stream)
    error = kit.assert_error(response, 429, code, None, "what happened")
    assert error["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == told
