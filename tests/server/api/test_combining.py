"""Several adapters in one request, by weight: what reaches the engine, is said, or refused."""

from __future__ import annotations

import pytest

from server.engine.request import AdapterImage, AdapterPart, combination

TWO = [{"id": "shout@1", "weight": 0.7}, {"id": "acme/json", "weight": 0.3}]
ROUTES = ["chat", "complete"]


@pytest.fixture
def image_of(shared_store):
    """The image of a combination given as reference=weight pairs."""

    def build(*members: tuple[str, float]) -> AdapterImage:
        versions = [(shared_store.resolve(reference), weight) for reference, weight in members]
        return combination(
            AdapterPart(AdapterImage(v.digest, str(shared_store.image(v))), weight)
            for v, weight in versions
        )

    return build


@pytest.fixture
def with_settings(server):
    def change(**settings) -> None:
        state = server.client.app.state.server
        state.settings = state.settings.model_copy(update=settings)

    return change


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", [None, "tiny-base"])
def test_a_combination_reaches_the_engine_and_is_told(server, shared_store, image_of, route, model):
    response = getattr(server, route)(model=model, adapters=TWO)
    wanted = image_of(("shout@1", 0.7), ("acme/json", 0.3))
    (submit,) = server.engine.submits
    assert submit.adapter == wanted
    parts = [
        {"id": v.adapter_id, "version": 1, "digest": v.digest, "weight": weight}
        for v, weight in [
            (shared_store.resolve("shout@1"), 0.7),
            (shared_store.resolve("acme/json"), 0.3),
        ]
    ]
    body = response.json()
    assert body["adapter"] == {"digest": wanted.digest, "parts": parts}
    assert body["model"] == "shout+acme/json"
    headers = {k: v for k, v in response.headers.items() if k.startswith("x-manylora")}
    assert headers == {
        "x-manylora-model": "tiny-base",
        "x-manylora-adapter": "shout, acme/json",
        "x-manylora-adapter-version": "1, 1",
        "x-manylora-adapter-weight": "0.7, 0.3",
        "x-manylora-adapter-digest": wanted.digest,
    }


def test_every_chunk_of_a_stream_says_what_was_combined(server, kit):
    chunks = kit.chunks_of(server.chat(adapters=TWO, stream=True))
    assert {len(chunk["adapter"]["parts"]) for chunk in chunks} == {2}


def test_two_versions_of_one_name_may_be_combined(server, image_of):
    server.chat(adapters=[{"id": "shout", "weight": 2}, {"id": "shout@1", "weight": -1}])
    assert server.engine.submits[0].adapter == image_of(("shout@2", 2.0), ("shout@1", -1.0))


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({"adapter_id": "shout", "scale": 0.5}, 0.5),
        ({"model": "shout", "scale": -1}, -1.0),
        ({"adapters": [{"id": "shout", "weight": 0.5}]}, 0.5),
        ({"adapters": [{"id": "shout", "weight": 0.5}], "scale": 1.0}, 0.5),
    ],
)
def test_the_scale_of_one_adapter_is_its_weight(server, image_of, fields, weight):
    body = server.chat(**fields).json()
    assert server.engine.submits[0].adapter == image_of(("shout", weight))
    assert [part["weight"] for part in body["adapter"]["parts"]] == [weight]
    assert body["model"] == "shout"


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_id": "shout", "scale": 1},
        {"adapters": [{"id": "shout", "weight": 1.0}]},
        {"adapters": [{"id": "shout"}]},
        {"adapters": [{"id": "shout"}, {"id": "acme/json", "weight": 0}]},
        {"merged_adapters": {"ids": ["shout"]}},
    ],
)
def test_one_adapter_at_its_own_scale_is_that_adapter(server, shared_store, fields):
    body = server.chat(**fields).json()
    digest = shared_store.resolve("shout").digest
    assert server.engine.submits[0].adapter.digest == digest
    assert body["adapter"] == {"id": "shout", "version": 2, "digest": digest}


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_id": "shout", "scale": 0},
        {"adapters": [{"id": "shout", "weight": 0}, {"id": "acme/json", "weight": 0.0}]},
        {"scale": 1.0},
    ],
)
def test_nothing_of_any_adapter_is_the_base_model_and_said_to_be(server, fields):
    response = server.chat(**fields)
    assert server.engine.submits[0].adapter is None
    assert "adapter" not in response.json()
    assert response.json()["model"] == "tiny-base"
    assert "x-manylora-adapter" not in response.headers


@pytest.mark.parametrize(
    ("merged", "weights"),
    [
        ({"ids": ["shout", "acme/json"], "weights": [0.7, 0.3]}, (0.7, 0.3)),
        ({"ids": ["shout", "acme/json"]}, (1.0, 1.0)),
        (
            {
                "ids": ["shout", "acme/json"],
                "weights": [2, 3],
                "merge_strategy": "linear",
                "density": 0.0,
                "majority_sign_method": "total",
            },
            (2.0, 3.0),
        ),
    ],
)
def test_loraxs_merged_adapters_are_taken_for_linear(server, image_of, merged, weights):
    server.chat(merged_adapters=merged)
    wanted = image_of(("shout", weights[0]), ("acme/json", weights[1]))
    assert server.engine.submits[0].adapter == wanted


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"adapters": []}, "invalid_value", "adapters", ("at least 1",)),
        ({"adapters": [{"id": "shout"}] * 17}, "invalid_value", "adapters", ("16", "17")),
        ({"adapters": "shout"}, "invalid_type", "adapters", ("'shout'",)),
        ({"adapters": ["shout"]}, "invalid_value", "adapters[0]", ("shout",)),
        ({"adapters": [{"weight": 1}]}, "missing_required_parameter", "adapters[0].id", ()),
        (
            {"adapters": [{"id": "shout", "weight": 100.5}]},
            "invalid_value",
            "adapters[0].weight",
            ("100.5", "100"),
        ),
        (
            {"adapters": [{"id": "shout", "weight": -101}]},
            "invalid_value",
            "adapters[0].weight",
            ("-101", "-100"),
        ),
        (
            {"adapters": [{"id": "shout", "weight": "1"}]},
            "invalid_type",
            "adapters[0].weight",
            ("'1'",),
        ),
        (
            {"adapters": [{"id": "shout", "wieght": 1}]},
            "unknown_parameter",
            "adapters[0].wieght",
            (),
        ),
        (
            {"adapters": [{"id": "shout"}, {"id": "shout@2", "weight": 2}]},
            "invalid_value",
            "adapters[1].id",
            ("shout@2", "same weights", "sum"),
        ),
        ({"adapters": TWO, "adapter_id": "shout"}, "invalid_value", "adapter_id", ("shout",)),
        ({"adapters": TWO, "model": "shout@1"}, "invalid_value", "model", ("shout@1",)),
        ({"adapters": TWO, "model": "tiny-base:shout"}, "invalid_value", "model", ("shout",)),
        ({"adapters": TWO, "scale": 0.5}, "invalid_value", "scale", ("0.5", "adapters")),
        (
            {"adapters": TWO, "merged_adapters": {"ids": ["shout"]}},
            "invalid_value",
            "merged_adapters",
            ("shout",),
        ),
        (
            {"merged_adapters": {"ids": ["shout"]}, "adapter_id": "shout"},
            "invalid_value",
            "adapter_id",
            ("merged_adapters",),
        ),
        (
            {"merged_adapters": {"ids": ["shout", "acme/json"], "weights": [1]}},
            "invalid_value",
            "merged_adapters.weights",
            ("1 weights for 2 ids",),
        ),
        (
            {"merged_adapters": {"ids": ["shout"], "merge_strategy": "ties"}},
            "invalid_value",
            "merged_adapters.merge_strategy",
            ("'ties'", "'linear'"),
        ),
        ({"merged_adapters": {"ids": []}}, "invalid_value", "merged_adapters.ids", ()),
        ({"scale": 0.5}, "invalid_value", "scale", ("0.5", "adapter_id")),
        ({"adapter_id": "shout", "scale": 101}, "invalid_value", "scale", ("101", "100")),
        ({"adapter_id": "shout", "scale": True}, "invalid_type", "scale", ("true",)),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_combination_that_makes_no_sense_is_refused(
    server, kit, route, fields, code, param, words
):
    kit.assert_error(getattr(server, route)(**fields), 400, code, param, *words)
    assert server.engine.submits == []


@pytest.mark.parametrize("number", ["NaN", "1e999", "Infinity"])
def test_a_weight_that_is_no_finite_number_is_no_json(server, kit, number):
    raw = f'{{"prompt": "x", "adapters": [{{"id": "shout", "weight": {number}}}]}}'
    response = server.client.post("/v1/completions", content=raw.encode())
    kit.assert_error(response, 400, "invalid_json", None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"adapters": [{"id": "shout"}, {"id": "nope", "weight": 0}]}, "adapters[1].id"),
        ({"adapters": [{"id": "shout@9"}]}, "adapters[0].id"),
        ({"adapters": [{"id": "tiny-base"}]}, "adapters[0].id"),
        ({"merged_adapters": {"ids": ["shout", "nope"]}}, "merged_adapters.ids[1]"),
    ],
)
def test_an_unknown_member_is_404_whatever_its_weight(server, kit, fields, param):
    kit.assert_error(server.chat(**fields), 404, "model_not_found", param)
    assert server.engine.submits == []


def test_ranks_that_are_too_high_together_are_refused_with_the_sum(server, kit, with_settings):
    with_settings(max_adapter_rank=3)
    response = server.chat(adapters=TWO)
    words = ("2 + 2 = 4", "layers.0.self_attn.q_proj", "3", "max_adapter_rank")
    kit.assert_error(response, 400, "invalid_value", "adapters", *words)
    assert server.engine.submits == []
    with_settings(max_adapter_rank=4)
    assert server.chat(adapters=TWO).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "num_slots"),
    [({"adapters": TWO}, "adapters", 2), ({"adapter_id": "shout", "scale": 2}, "adapter_id", 1)],
)
def test_a_combination_without_a_slot_to_spare_is_refused(
    server, kit, with_settings, fields, param, num_slots
):
    with_settings(max_adapters=num_slots)
    words = (f"{num_slots + 1} slots", f"there are {num_slots}", "max_adapters")
    kit.assert_error(server.chat(**fields), 400, "invalid_value", param, *words)
    with_settings(max_adapters=num_slots + 1)
    assert server.chat(**fields).status_code == 200


def test_what_the_engine_cannot_hold_is_the_clients_fault(server, kit):
    server.engine.script = kit.fails("invalid_value", "5 + 8 = 13 pages")
    kit.assert_error(server.chat(adapters=TWO), 400, "invalid_value", None, "5 + 8 = 13 pages")


@pytest.mark.parametrize("wrong", ["member", "other weights", "base"])
def test_anything_but_the_combination_that_was_asked_for_is_withheld(server, kit, image_of, wrong):
    applied = {
        "member": image_of(("shout@1", 1.0)),
        "other weights": image_of(("shout@1", 0.3), ("acme/json", 0.7)),
        "base": None,
    }[wrong]
    honest = kit.says("hello")

    def script(request):
        other = {name: getattr(request, name) for name in request.__struct_fields__}
        return honest(type(request)(**{**other, "adapter": applied}))

    server.engine.script = script
    kit.assert_error(server.chat(adapters=TWO), 500, "adapter_mismatch", None)


def test_a_combination_runs_under_the_name_of_each_member(server):
    state = server.client.app.state.server
    seen = []
    script = server.engine.script

    def look(request):
        seen.append({name: len(ids) for name, ids in state.running.items()})
        return script(request)

    server.engine.script = look
    server.chat(adapters=[*TWO, {"id": "shout", "weight": 0.5}])
    assert seen == [{"shout": 1, "acme/json": 1}]
    assert state.running == {}


def test_a_member_that_is_being_deleted_takes_no_new_combinations(server, kit):
    server.client.app.state.server.deleting.add("shout")
    kit.assert_error(
        server.chat(adapters=TWO), 404, "model_not_found", "adapters[0].id", "being deleted"
    )
