"""An environment is made once for its requirements."""

import dataclasses
from pathlib import Path

import pytest

from bench.rivals import environments
from bench.rivals.environments import Environment, RivalError


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that were run, none of them really; rivals lie under a directory of the test."""
    run: list[list[str]] = []
    monkeypatch.setattr(environments, "RIVALS", tmp_path)
    monkeypatch.setattr(environments, "run", lambda command: run.append(command))
    return run


def test_installs_what_is_wanted_and_takes_out_what_is_not(commands):
    Environment("some", ("a==1", "b"), removed=("c",)).install()
    made, installed, removed = commands
    assert made[1:3] == ["-m", "venv"]
    assert installed[-3:] == ["install", "a==1", "b"]
    assert removed[-3:] == ["uninstall", "--yes", "c"]


def test_a_finished_environment_is_left_alone_until_its_requirements_change(commands):
    environment = Environment("some", ("a==1",))
    assert not environment.is_installed
    environment.install()
    num_commands = len(commands)
    environment.install()
    assert environment.is_installed
    assert len(commands) == num_commands
    changed = dataclasses.replace(environment, requirements=("a==2",))
    assert not changed.is_installed


def test_an_interrupted_installation_is_done_again(commands, monkeypatch):
    def fail(command):
        raise RivalError(f"{command[0]} ended with status 1")

    monkeypatch.setattr(environments, "run", fail)
    environment = Environment("some", ("a==1",))
    with pytest.raises(RivalError):
        environment.install()
    assert not environment.is_installed


def test_a_command_that_fails_is_named():
    with pytest.raises(RivalError, match="false ended with status 1"):
        environments.run(["false"], Path.cwd())
