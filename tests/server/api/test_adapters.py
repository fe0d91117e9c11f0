"""What the adapter routes promise, on a real store."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest

from server.engine.request import Load, ResidentAdapter


def files_under(directory):
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith("adapters.sqlite")
    )


def archive_of(kind, files, folder=""):
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    members = {folder + names[part]: content for part, content in files.items()}
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def load_with(*adapters):
    counters = {name: 0 for name in Load.__struct_fields__ if name.startswith("num_")}
    return Load(**counters, adapters=adapters)


def test_an_uploaded_adapter_answers_at_once(own_server):
    response = own_server.upload("mine", 1, description="my first")
    assert response.status_code == 201
    admitted = response.json()
    assert (admitted["id"], admitted["version"]) == ("mine", 1)
    assert admitted["report"]["accepted"] is True
    assert admitted["report"]["num_matched"] == 2
    assert own_server.chat(adapter_id="mine").json()["adapter"] == {
        "id": "mine",
        "version": 1,
        "digest": admitted["digest"],
    }
    assert [image.digest for image in own_server.engine.preloads] == [admitted["digest"]]


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz"])
def test_an_archive_is_the_same_adapter_as_its_two_files(own_server, kit, kind):
    digest = own_server.upload("two-files", 1).json()["digest"]
    archive = archive_of(kind, kit.adapter_files(1), folder="my-adapter/" if kind == "zip" else "")
    response = own_server.client.post(
        "/v1/adapters", data={"adapter_id": "acme/packed"}, files=kit.parts({"archive": archive})
    )
    assert response.status_code == 201, response.text
    assert response.json()["digest"] == digest


def test_other_weights_under_a_name_are_its_next_version_and_old_ones_stay(own_server):
    first = own_server.upload("mine", 1).json()
    second = own_server.upload("mine", 2).json()
    assert (first["version"], second["version"]) == (1, 2)
    assert own_server.chat(adapter_id="mine").json()["adapter"]["digest"] == second["digest"]
    assert own_server.chat(adapter_id="mine@1").json()["adapter"]["digest"] == first["digest"]
    assert own_server.upload("mine", 2).json()["version"] == 2


def test_a_dry_run_reports_and_keeps_nothing(own_server, kit):
    response = own_server.upload("mine", 1, dry_run="true")
    assert response.status_code == 200
    assert response.json()["dry_run"] is True
    assert response.json()["report"]["accepted"] is True
    assert "version" not in response.json()
    kit.assert_error(own_server.chat(adapter_id="mine"), 404, "model_not_found", "adapter_id")


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_refused_adapter_gets_its_report_and_stores_nothing(own_server, kit, dry_run):
    before = files_under(own_server.data_dir)
    response = own_server.client.post(
        "/v1/adapters",
        data={"adapter_id": "mine", "dry_run": dry_run},
        files=kit.parts(kit.adapter_files(1, nan=True)),
    )
    assert response.status_code == 422
    body = response.json()
    assert body["error"]["code"] == "adapter_refused"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["report"]["accepted"] is False
    assert body["report"]["problems"][0]["remedy"]
    assert files_under(own_server.data_dir) == before
    assert own_server.client.get("/v1/adapters").json()["data"] == []


def test_a_broken_archive_is_refused_with_its_report(own_server, kit):
    response = own_server.client.post(
        "/v1/adapters", data={"adapter_id": "mine"}, files=kit.parts({"archive": b"PK\x03\x04zzz"})
    )
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "broken_archive"
    assert response.json()["report"]["problems"][0]["code"] == "broken_archive"


@pytest.mark.parametrize(
    ("data", "names", "code", "param"),
    [
        ({}, ("config", "weights"), "missing_required_parameter", "adapter_id"),
        ({"adapter_id": "a"}, ("config",), "missing_required_parameter", "weights"),
        ({"adapter_id": "a"}, ("weights",), "missing_required_parameter", "config"),
        ({"adapter_id": "a"}, ("config", "archive"), "invalid_value", "archive"),
        ({"adapter_id": "a", "x": "1"}, ("config", "weights"), "unknown_parameter", "x"),
        ({"adapter_id": "a", "dry_run": "x"}, ("config", "weights"), "invalid_value", "dry_run"),
        ({"adapter_id": "../a"}, ("config", "weights"), "invalid_value", "adapter_id"),
        ({"adapter_id": "a" * 129}, ("config", "weights"), "invalid_value", "adapter_id"),
        ({"adapter_id": "tiny-base"}, ("config", "weights"), "invalid_value", "adapter_id"),
        (
            {"adapter_id": "a", "description": "x" * 20_000},
            ("config", "weights"),
            "invalid_value",
            "description",
        ),
    ],
)
def test_an_upload_with_wrong_parts_is_refused_by_the_parts_name(
    own_server, kit, data, names, code, param
):
    contents = {**kit.adapter_files(1), "archive": b"x"}
    files = kit.parts({name: contents[name] for name in names})
    response = own_server.client.post("/v1/adapters", data=data, files=files)
    kit.assert_error(response, 400, code, param)
    assert files_under(own_server.data_dir) == ["lock"]


def test_a_pickle_is_refused_with_the_way_to_convert_it(own_server, kit):
    files = {"weights": ("adapter_model.bin", b"x"), "config": ("c.json", b"{}")}
    response = own_server.client.post("/v1/adapters", data={"adapter_id": "a"}, files=files)
    kit.assert_error(
        response, 400, "invalid_value", "weights", "adapter_model.bin", "save_pretrained"
    )


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data"])
def test_a_body_that_is_no_form_is_refused(own_server, kit, content_type):
    response = own_server.client.post(
        "/v1/adapters", content=b"{}", headers={"content-type": content_type}
    )
    kit.assert_error(response, 400, "invalid_multipart", None, "curl -F")


def test_an_upload_that_declares_too_many_bytes_is_refused_with_the_limit(own_server, kit):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = own_server.client.post("/v1/adapters", content=b"x" * 100_001, headers=headers)
    kit.assert_error(response, 413, "payload_too_large", None, "100000", "max_upload_bytes")
    assert files_under(own_server.data_dir) == ["lock"]


def test_a_form_cut_off_anywhere_is_refused_and_leaves_nothing(own_server, kit):
    request = own_server.client.build_request(
        "POST",
        "/v1/adapters",
        data={"adapter_id": "mine"},
        files=kit.parts(kit.adapter_files(1)),
    )
    whole = request.read()
    headers = {"content-type": request.headers["content-type"]}
    for length in [*range(0, len(whole) - 4, 61), len(whole) - 5]:
        response = own_server.client.post("/v1/adapters", content=whole[:length], headers=headers)
        kit.assert_error(response, 400, "invalid_multipart", None)
    assert files_under(own_server.data_dir) == ["lock"]
    assert own_server.client.post("/v1/adapters", content=whole, headers=headers).status_code == 201


def test_lists_adapters_with_versions_and_where_they_are(own_server):
    first = own_server.upload("mine", 1).json()["digest"]
    second = own_server.upload("mine", 2, description="better").json()["digest"]
    third = own_server.upload("acme/other", 3).json()["digest"]
    own_server.engine.load = load_with(
        ResidentAdapter(digest=third, state="host", num_host_pages=1),
        ResidentAdapter(digest=first, state="loading", num_pages=0, num_users=0, num_uses=0),
        ResidentAdapter(digest=second, state="resident", num_pages=1, num_users=2, num_uses=9),
    )
    listed = own_server.client.get("/v1/adapters").json()
    assert listed["object"] == "list"
    other, mine = listed["data"]
    assert (other["id"], other["state"], other["num_users"]) == ("acme/other", "host", 0)
    assert (mine["version"], mine["digest"], mine["state"]) == (2, second, "resident")
    assert (mine["num_pages"], mine["num_users"], mine["description"]) == (1, 2, "better")
    assert [each["version"] for each in mine["versions"]] == [2, 1]
    assert [each["state"] for each in mine["versions"]] == ["resident", "loading"]
    assert mine["versions"][0]["num_uses"] == 9
    assert "report" not in mine


@pytest.mark.parametrize("adapter_id", ["mine", "acme/mine"])
def test_an_adapter_is_shown_with_its_reports(own_server, adapter_id):
    own_server.upload(adapter_id, 1)
    shown = own_server.client.get(f"/v1/adapters/{adapter_id}").json()
    assert shown["id"] == adapter_id
    assert shown["report"]["modules"][0]["rank"] == 2
    assert shown["versions"][0]["report"] == shown["report"]
    encoded = adapter_id.replace("/", "%2F")
    assert own_server.client.get(f"/v1/adapters/{encoded}").json() == shown


def test_deleting_frees_the_device_and_the_name(own_server, kit):
    digests = {own_server.upload("acme/mine", seed).json()["digest"] for seed in (1, 2)}
    response = own_server.client.delete("/v1/adapters/acme/mine")
    assert response.json() == {
        "id": "acme/mine",
        "object": "adapter",
        "deleted": True,
        "versions": [1, 2],
        "freed_bytes": 1024,
    }
    assert set(own_server.engine.drops) == {(digest, False) for digest in digests}
    kit.assert_error(own_server.chat(model="acme/mine"), 404, "model_not_found", "model")
    response = own_server.client.delete("/v1/adapters/acme/mine")
    kit.assert_error(response, 404, "model_not_found", "adapter_id", "acme/mine")


def test_deleting_with_abort_tells_the_engine_so(own_server):
    digest = own_server.upload("mine", 1).json()["digest"]
    own_server.client.delete("/v1/adapters/mine?mode=abort")
    assert own_server.engine.drops == [(digest, True)]


def test_weights_that_another_name_has_too_stay_on_the_device(own_server):
    own_server.upload("one", 1)
    own_server.upload("two", 1)
    assert own_server.client.delete("/v1/adapters/one").json()["freed_bytes"] == 0
    assert own_server.engine.drops == []
    assert own_server.chat(adapter_id="two").status_code == 200


def test_while_requests_drain_the_name_takes_no_new_ones(own_server, kit):
    own_server.upload("mine", 1)
    seen = []
    drop = own_server.engine.drop

    async def drop_and_look(digest, abort=False):
        state = own_server.client.app.state.server
        seen.append(set(state.deleting))
        assert own_server.store.resolve("mine").version == 1
        return await drop(digest, abort)

    own_server.engine.drop = drop_and_look
    own_server.client.delete("/v1/adapters/mine")
    assert seen == [{"mine"}]
    own_server.upload("mine", 2)
    own_server.client.app.state.server.deleting.add("mine")
    response = own_server.chat(adapter_id="mine")
    kit.assert_error(response, 404, "model_not_found", "adapter_id", "being deleted")


def test_deleting_works_while_the_engine_starts(own_server):
    own_server.engine.started = None
    own_server.upload("mine", 1)
    assert own_server.client.delete("/v1/adapters/mine").json()["deleted"] is True


def test_a_request_keeps_its_version_when_the_name_is_replaced_under_it(own_server, kit):
    first = own_server.upload("mine", 1).json()["digest"]
    plain = kit.says("hello")
    replacement = kit.adapter_files(2)

    def script(request):
        events = list(plain(request))
        yield events[0]
        with own_server.store.staging() as staging:
            (staging / "adapter_config.json").write_bytes(replacement["config"])
            (staging / "adapter_model.safetensors").write_bytes(replacement["weights"])
            own_server.store.add("mine", staging)
        yield from events[1:]

    own_server.engine.script = script
    chunks = kit.chunks_of(own_server.chat(adapter_id="mine", stream=True))
    assert {(c["adapter"]["version"], c["adapter"]["digest"]) for c in chunks} == {(1, first)}
    assert own_server.store.resolve("mine").version == 2
