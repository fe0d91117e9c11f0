"""Promises of the store: versions, references, idempotence, deletion, restarts, threads."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors import safe_open

from adapters_store import admission
from adapters_store.checking import check_adapter
from adapters_store.errors import (
    AdapterRefused,
    InvalidAdapterId,
    StoreLocked,
    StoreUnusable,
    UnknownAdapter,
)
from adapters_store.store import AdapterStore


@pytest.fixture(autouse=True)
def checks_in_this_process(monkeypatch):
    """test_admission.py covers the process; here it would only take time."""
    monkeypatch.setattr(admission, "check", check_adapter)


@pytest.fixture
def open_store(tmp_path, layout):
    """Open the one store of the test again and again; the previous opening is closed first."""
    opened = []

    def run(layout=layout, max_rank=64, max_pages=None):
        if opened:
            opened.pop().close()
        opened.append(
            AdapterStore(tmp_path / "store", layout, max_rank=max_rank, max_pages=max_pages)
        )
        return opened[-1]

    yield run
    if opened:
        opened.pop().close()


@pytest.fixture
def directory(layout, make_adapter, tmp_path):
    """Directories with adapters that differ by seed."""

    def run(seed, **changes):
        adapter = make_adapter(layout, seed=seed)
        adapter.config |= changes
        return adapter.write(tmp_path / f"adapter-{seed}")

    return run


def stored_files(root):
    paths = (path for name in ("files", "images", "tmp") for path in (root / name).rglob("*"))
    return sorted(str(path.relative_to(root)) for path in paths if path.is_file())


def test_keeps_an_adapter_and_its_image_over_a_restart(open_store, directory, layout):
    added = open_store().add("owner/name", directory(1), description="first")
    store = open_store()
    assert store.resolve("owner/name") == added
    assert added.version == 1
    assert added.description == "first"
    assert added.report.accepted
    assert added.num_pages == added.report.num_pages > 0
    with safe_open(store.image(added), "np") as image:
        assert image.metadata() == {
            "digest": added.digest,
            "layout": layout.key,
            "format_version": "1",
        }


def test_the_same_content_is_the_same_version(open_store, directory):
    store = open_store()
    first = store.add("name", directory(1))
    assert store.add("name", directory(1, lora_dropout=0.5)) == first
    assert len(store.get("name").versions) == 1


def test_other_content_is_the_next_version_and_the_name_points_at_it(open_store, directory):
    store = open_store()
    first, second = store.add("name", directory(1)), store.add("name", directory(2))
    assert (first.version, second.version) == (1, 2)
    assert store.resolve("name") == second
    assert store.resolve("name@1") == first
    assert store.get("name").versions == (first, second)


def test_adding_an_earlier_content_again_points_back_at_its_version(open_store, directory):
    store = open_store()
    first = store.add("name", directory(1))
    store.add("name", directory(2))
    assert store.add("name", directory(1)) == first
    assert store.resolve("name") == store.get("name").current == first


def test_version_numbers_are_never_used_again(open_store, directory):
    store = open_store()
    store.add("name", directory(1))
    store.add("name", directory(2))
    store.delete("name")
    assert open_store().add("name", directory(1)).version == 3


def test_resolves_names_versions_and_digests(open_store, directory):
    store = open_store()
    first, second = store.add("name", directory(1)), store.add("name", directory(2))
    for version in (first, second):
        assert store.resolve(f"name@sha256:{version.digest}") == version
        assert store.resolve(f"name@sha256:{version.digest[:12]}") == version
        assert store.resolve(version.reference) == version


@pytest.mark.parametrize(
    "reference",
    ["other", "name@2", "name@sha256:000000000000", "name@x", "", "a b", "name@0", "nam", "name/x"],
)
def test_unknown_and_malformed_references_are_the_same_error(open_store, directory, reference):
    store = open_store()
    store.add("name", directory(1))
    with pytest.raises(UnknownAdapter) as error:
        store.resolve(reference)
    assert error.value.reference == reference


def test_a_refused_adapter_leaves_nothing(open_store, directory, tmp_path):
    store = open_store()
    with pytest.raises(AdapterRefused, match="DoRA") as refusal:
        store.add("name", directory(1, use_dora=True))
    assert not refusal.value.report.accepted
    assert store.adapters() == []
    assert stored_files(tmp_path / "store") == []


def test_a_dry_run_reports_and_keeps_nothing(open_store, directory, tmp_path):
    store = open_store()
    assert store.add("name", directory(1), dry_run=True).accepted
    assert not store.add("name", directory(2, use_dora=True), dry_run=True).accepted
    assert store.adapters() == []
    assert stored_files(tmp_path / "store") == []


def test_refuses_a_bad_name_before_anything_else(open_store, tmp_path):
    with pytest.raises(InvalidAdapterId):
        open_store().add("../name", tmp_path / "nothing")


def test_refuses_what_is_no_directory_of_two_regular_files(open_store, directory, tmp_path):
    store = open_store()
    with pytest.raises(AdapterRefused, match="there is no directory"):
        store.add("name", tmp_path / "nothing")
    pipe = directory(1) / "adapter_config.json"
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(AdapterRefused, match="not a regular file"):
        store.add("name", pipe.parent)


def test_refuses_a_file_that_no_adapter_of_this_base_can_fill(open_store, directory):
    source = directory(1)
    with (source / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterRefused, match="the limit here is"):
        open_store().add("name", source)


def test_follows_links_to_the_files(open_store, directory, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for path in directory(1).iterdir():
        (links / path.name).symlink_to(path)
    store = open_store()
    assert store.add("name", links) == store.add("name", directory(1))


def test_deleting_removes_the_content_that_no_other_name_has(open_store, directory, tmp_path):
    store = open_store()
    shared = store.add("first", directory(1))
    store.add("first", directory(2))
    kept = store.add("second", directory(1))
    removed = store.delete("first")
    assert [version.version for version in removed] == [1, 2]
    assert store.image(kept).exists()
    assert {name.split("/")[1][:64] for name in stored_files(tmp_path / "store")} == {shared.digest}
    store.delete("second")
    assert stored_files(tmp_path / "store") == []
    with pytest.raises(UnknownAdapter):
        store.delete("second")
    with pytest.raises(UnknownAdapter):
        store.image(kept)


def test_packs_again_for_another_dtype_and_page_size(open_store, directory, make_layout):
    old = open_store().add("name", directory(1))
    layout = make_layout("bfloat16", page_elements=512)
    store = open_store(layout)
    version = store.resolve("name")
    assert version.digest == old.digest
    assert version.num_pages > old.num_pages
    with safe_open(store.image(version), "np") as image:
        assert image.get_slice("pages").get_shape() == [version.num_pages, 512]
        assert image.get_slice("pages").get_dtype() == "BF16"
        assert image.metadata()["layout"] == layout.key


def test_sizes_after_a_change_of_layout_are_those_of_a_fresh_check(
    open_store, directory, make_layout
):
    open_store().add("name", directory(1))
    layout = make_layout("bfloat16", page_elements=512)
    found = open_store(layout).resolve("name").report
    fresh = check_adapter(directory(1), layout, max_rank=64)
    for size in ("num_rows", "num_pages", "page_waste", "host_bytes", "device_bytes"):
        assert getattr(found, size) == getattr(fresh, size)


def test_keeps_the_adapters_of_bases_with_other_shapes_apart(
    open_store, directory, make_layout, make_adapter, tmp_path
):
    open_store().add("name", directory(1))
    other = make_layout(num_layers=2)
    store = open_store(other)
    assert store.adapters() == []
    with pytest.raises(UnknownAdapter, match="only for another one"):
        store.resolve("name")
    source = make_adapter(other).write(tmp_path / "other")
    assert store.add("name", source).version == 2
    store.delete("name")
    assert open_store().resolve("name").version == 1


def test_a_lowered_limit_refuses_what_was_admitted_before(open_store, directory):
    version = open_store().add("name", directory(1))
    with pytest.raises(AdapterRefused, match="limit of 2"):
        open_store(max_rank=2).image(version)
    with pytest.raises(AdapterRefused, match="at most 1"):
        open_store(max_pages=1).image(version)


def test_a_second_opening_names_the_process_that_has_it(open_store, layout, tmp_path):
    open_store()
    with pytest.raises(StoreLocked, match=f"pid {os.getpid()}: stop"):
        AdapterStore(tmp_path / "store", layout, max_rank=8, max_pages=None)


def test_refuses_a_directory_of_a_newer_version(open_store, tmp_path):
    open_store()
    database = sqlite3.connect(tmp_path / "store" / "adapters.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreUnusable, match="format 99"):
        open_store()


def test_opening_removes_unfinished_work_and_orphans(open_store, directory, tmp_path):
    root = tmp_path / "store"
    kept = open_store().add("name", directory(1))
    before = stored_files(root)
    (root / "tmp" / "upload").mkdir()
    (root / "tmp" / "upload" / "part").write_bytes(b"x")
    (root / "files" / ("0" * 64)).mkdir()
    (root / "images" / f"{'0' * 64}.{'1' * 16}.safetensors").write_bytes(b"x")
    assert open_store().resolve("name") == kept
    assert stored_files(root) == before


def test_staging_is_removed_even_after_an_error(open_store, tmp_path):
    store = open_store()

    def fail():
        with store.staging() as path:
            (path / "part").write_bytes(b"x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_a_full_disk_leaves_nothing(open_store, directory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = open_store()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.add("name", directory(1))
    assert store.adapters() == []
    assert stored_files(tmp_path / "store") == []


def test_threads_may_add_read_and_delete_at_once(open_store, directory, tmp_path):
    store = open_store()
    sources = [directory(seed) for seed in range(3)]

    def work(number):
        name = f"name-{number % 4}"
        store.add(name, sources[number % 3])
        store.adapters()
        if number % 5 == 0:
            try:
                store.delete(name)
            except UnknownAdapter:
                return
        try:
            store.image(store.resolve(name))
        except UnknownAdapter:
            return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    known = {v.digest for adapter in store.adapters() for v in adapter.versions}
    assert {name.split("/")[1][:64] for name in stored_files(tmp_path / "store")} == known
    for adapter in open_store().adapters():
        assert adapter.current in adapter.versions
