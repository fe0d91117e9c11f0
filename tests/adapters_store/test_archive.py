"""Promises of archives: the two files come out, and nothing else can happen."""

import gzip
import io
import tarfile
import zipfile

import pytest

from adapters_store.archive import MAX_MEMBERS, extract
from adapters_store.errors import ArchiveRefused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"r": 1}', WEIGHTS: bytes(range(256)) * 40}


def as_zip(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def as_tar(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def as_tar_gz(files):
    return gzip.compress(as_tar(files))


PACKERS = [as_zip, as_tar, as_tar_gz]


@pytest.fixture
def unpack(tmp_path):
    """Extract the bytes of an archive; returns what then lies in the directory."""

    def run(content, max_bytes=1 << 20):
        archive, directory = tmp_path / "upload", tmp_path / "out"
        archive.write_bytes(content)
        directory.mkdir(exist_ok=True)
        extract(archive, directory, max_bytes=max_bytes)
        return {path.name: path.read_bytes() for path in directory.iterdir()}

    return run


def refusal_of(unpack, content, **limits):
    with pytest.raises(ArchiveRefused) as refusal:
        unpack(content, **limits)
    return refusal.value.problem


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "./my-adapter/"])
def test_takes_the_two_files_from_the_root_or_one_folder(unpack, pack, prefix):
    files = {f"{prefix}{name}": content for name, content in FILES.items()}
    files |= {f"{prefix}README.md": b"text", f"{prefix}sub/{CONFIG}": b"other"}
    files |= {f"__MACOSX/{CONFIG}": b"resource fork", f"{prefix}._{CONFIG}": b"resource fork"}
    assert unpack(pack(files)) == FILES


@pytest.mark.parametrize("mode", ["w:gz", "w:"])
def test_takes_a_tree_as_tar_makes_it(unpack, tmp_path, mode):
    tree = tmp_path / ("a-long-name" * 12)
    tree.mkdir()
    for name, content in FILES.items():
        (tree / name).write_bytes(content)
    with tarfile.open(tmp_path / "made", mode) as archive:
        archive.add(tree, tree.name)
    assert unpack((tmp_path / "made").read_bytes()) == FILES


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil"])
def test_refuses_paths_that_leave_the_archive(unpack, pack, name):
    assert refusal_of(unpack, pack({**FILES, name: b""})).code == "unsafe_archive"


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("name", [CONFIG, "other"])
def test_refuses_links_and_devices(unpack, kind, name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    assert refusal_of(unpack, as_tar({**FILES, name: member})).code == "unsafe_archive"


def test_refuses_links_in_a_zip(unpack):
    link = zipfile.ZipInfo(CONFIG)
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert refusal_of(unpack, buffer.getvalue()).code == "unsafe_archive"


@pytest.mark.parametrize("pack", PACKERS)
def test_stops_unpacking_at_the_limit(unpack, pack, tmp_path):
    bomb = pack({CONFIG: b"{}", WEIGHTS: b"\0" * (4 << 20)})
    problem = refusal_of(unpack, bomb, max_bytes=1 << 20)
    assert problem.code == "archive_too_large"
    assert str(1 << 20) in problem.message
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 1 << 20


@pytest.mark.parametrize("pack", PACKERS)
def test_refuses_a_configuration_without_end(unpack, pack):
    bomb = pack({CONFIG: b" " * (2 << 20), WEIGHTS: b""})
    assert refusal_of(unpack, bomb, max_bytes=8 << 20).code == "invalid_config"


@pytest.mark.parametrize("pack", PACKERS)
def test_refuses_too_many_members(unpack, pack):
    many = {f"file{i}": b"" for i in range(MAX_MEMBERS + 1)}
    assert "members" in refusal_of(unpack, pack(many)).message


@pytest.mark.parametrize("pack", PACKERS)
def test_refuses_an_archive_without_the_two_files(unpack, pack):
    assert refusal_of(unpack, pack({WEIGHTS: b""})).code == "missing_file"


@pytest.mark.parametrize("pack", PACKERS)
def test_refuses_pickles_and_says_how_to_convert(unpack, pack):
    problem = refusal_of(unpack, pack({CONFIG: b"{}", "adapter_model.bin": b"\x80"}))
    assert problem.code == "pickle_weights"
    assert "safe_serialization=True" in problem.remedy


@pytest.mark.parametrize("pack", PACKERS)
def test_refuses_two_adapters_in_one_archive(unpack, pack):
    files = {f"{top}/{name}": content for top in "ab" for name, content in FILES.items()}
    assert refusal_of(unpack, pack(files)).code == "broken_archive"
    assert refusal_of(unpack, pack({f"a/{CONFIG}": b"", f"b/{WEIGHTS}": b""}))


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_files_at_the_root_go_before_checkpoints_in_folders(unpack, pack, backwards):
    files = {f"checkpoint-{n}/{name}": b"old" for n in (1, 2) for name in FILES} | FILES
    assert unpack(pack(dict(sorted(files.items(), reverse=backwards)))) == FILES


def test_refuses_a_file_that_is_there_twice(unpack):
    whole = as_tar(FILES)
    config = whole[:1024]  # header and content
    problem = refusal_of(unpack, config + whole)
    assert problem.code == "broken_archive"
    assert "twice" in problem.message


@pytest.mark.parametrize("pack", PACKERS)
def test_truncation_anywhere_is_refused(unpack, pack, tmp_path):
    content = pack(FILES)
    # The padding after the last member of a tar carries nothing.
    end = content.rindex(FILES[WEIGHTS][-1:]) if pack is as_tar else len(content)
    for length in range(0, end, 97):
        for path in (tmp_path / "out").glob("*"):
            path.unlink()
        assert refusal_of(unpack, content[:length]).remedy


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x1f\x8b", b"hello" * 200, b"\0" * 2048])
def test_refuses_what_is_no_archive(unpack, content):
    assert refusal_of(unpack, content).code in ("broken_archive", "missing_file")
