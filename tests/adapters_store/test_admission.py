"""Promises of the checking process: it answers as the check does, and its death is an answer."""

import subprocess
import sys
import tarfile

import pytest
from safetensors.numpy import load_file

from adapters_store import admission
from adapters_store.checking import check_adapter
from adapters_store.errors import AdmissionFailed, ArchiveRefused


def test_answers_as_the_check_in_this_process(adapter, layout, tmp_path):
    directory = adapter.write(tmp_path)
    report = admission.check(
        directory, layout, max_rank=64, max_pages=9, image_path=tmp_path / "image"
    )
    assert report == check_adapter(directory, layout, max_rank=64, image_path=tmp_path / "same")
    image, same = load_file(tmp_path / "image"), load_file(tmp_path / "same")
    assert all((image[name] == same[name]).all() for name in ("pages", *image))


def test_an_expression_that_never_ends_is_refused_in_time(adapter, layout, tmp_path):
    adapter.config["target_modules"] = r"((([a-z._0-9]+)*)*)*\1$!"
    report = admission.check(adapter.write(tmp_path), layout, max_rank=64, timeout_seconds=1)
    assert [problem.code for problem in report.problems] == ["check_timed_out"]


def test_a_check_that_needs_too_much_memory_is_refused(adapter, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "SPARE_MEMORY_BYTES", 400 << 20)
    adapter.config["rank_pattern"] = {"q_proj": 4}
    directory = adapter.write(tmp_path)
    big = type(layout)("big", 3, layout.targets, 1 << 30, "float32")
    report = admission.check(directory, big, max_rank=64)
    assert [problem.code for problem in report.problems] == ["check_failed"]


def test_a_fault_that_is_not_the_adapters_is_no_refusal(adapter, layout, tmp_path):
    directory = adapter.write(tmp_path)
    with pytest.raises(AdmissionFailed, match="checking process"):
        admission.check(directory, layout, max_rank=64, image_path=tmp_path / "no" / "image")


def test_unpacks_an_archive_in_the_process(adapter, tmp_path):
    directory = adapter.write(tmp_path / "adapter")
    with tarfile.open(tmp_path / "upload", "w:gz") as archive:
        archive.add(directory, "adapter")
    (tmp_path / "out").mkdir()
    admission.extract(tmp_path / "upload", tmp_path / "out", max_bytes=1 << 20)
    for path in directory.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_carries_the_refusal_of_an_archive(tmp_path):
    (tmp_path / "upload").write_bytes(b"no archive")
    with pytest.raises(ArchiveRefused, match="archive"):
        admission.extract(tmp_path / "upload", tmp_path, max_bytes=1 << 20)


def test_a_tar_header_that_claims_gigabytes_cannot_take_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "SPARE_MEMORY_BYTES", 300 << 20)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 2 << 30
    with (tmp_path / "upload").open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(2 << 30)
    with pytest.raises(ArchiveRefused) as refusal:
        admission.extract(tmp_path / "upload", tmp_path, max_bytes=16 << 30)
    assert refusal.value.problem.code == "check_failed"


def test_the_process_and_the_store_import_no_torch():
    script = "import sys, adapters_store.store, adapters_store.checking, adapters_store.archive\n"
    script += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
