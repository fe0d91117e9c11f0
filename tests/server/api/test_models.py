"""What GET /v1/models promises."""

from __future__ import annotations

import pytest


def test_lists_the_base_model_and_its_adapters(server, kit, shared_store):
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    base, json_adapter, shout = listed["data"]
    assert base["id"] == base["root"] == kit.model
    assert "parent" not in base
    assert base["max_model_len"] == shout["max_model_len"] == kit.max_context
    assert (json_adapter["id"], json_adapter["owned_by"]) == ("acme/json", "acme")
    assert (shout["parent"], shout["root"], shout["version"]) == (kit.model, "shout@2", 2)
    assert shout["digest"] == shared_store.resolve("shout").digest
    assert {each["object"] for each in listed["data"]} == {"model"}


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("tiny-base", "tiny-base"),
        ("shout", "shout@2"),
        ("shout@1", "shout@1"),
        ("acme/json", "acme/json@1"),
        ("tiny-base:shout", "shout@2"),
    ],
)
def test_every_name_that_a_request_may_use_is_a_model(server, name, root):
    assert server.client.get(f"/v1/models/{name}").json()["root"] == root


def test_an_unknown_model_is_404(server, kit):
    response = server.client.get("/v1/models/nope")
    kit.assert_error(response, 404, "model_not_found", "model", "nope", "/v1/models")


def test_models_are_listed_while_the_engine_starts(server, kit):
    server.engine.started = None
    assert len(server.client.get("/v1/models").json()["data"]) == 3
