"""A server runs from when it is ready until the block ends, and not longer."""

import os
import select
import sys

import pytest

from bench.rivals.environments import RivalError
from bench.rivals.server_process import free_port, running
from bench.rivals.streaming import Request, ask_all

HTTP_SERVER = (sys.executable, "-m", "http.server", "--bind", "127.0.0.1")


def test_a_server_is_ready_in_the_block_and_gone_after_it(tmp_path):
    port, request = free_port(), Request("/", {}, lambda _: None, lambda _: None)
    command = (*HTTP_SERVER, "--directory", str(tmp_path), str(port))
    with (
        running(command, {}, port, "/", tmp_path / "log"),
        pytest.raises(RivalError, match="501"),  # it answers, but has no POST
    ):
        ask_all(port, [request], concurrency=1)
    with pytest.raises(RivalError, match="Connect"):
        ask_all(port, [request], concurrency=1)


def test_processes_of_the_server_end_with_it(tmp_path):
    port, pid = free_port(), tmp_path / "pid"
    serve = " ".join([*HTTP_SERVER, "--directory", str(tmp_path), str(port)])
    script = f"sleep 600 & echo $! > {pid}; exec {serve}"
    with running(("sh", "-c", script), {}, port, "/", tmp_path / "log"):
        child = os.pidfd_open(int(pid.read_text()))
    has_ended, _, _ = select.select([child], [], [], 10)
    os.close(child)
    assert has_ended


def test_a_server_that_ends_before_it_is_ready_is_an_error_that_names_its_log(tmp_path):
    log = tmp_path / "logs" / "broken.log"
    command = (sys.executable, "-c", "import sys; sys.exit('no memory')")
    with pytest.raises(RivalError, match=r"ended with status 1 .* see .*broken\.log"):  # noqa: SIM117
        with running(command, {}, free_port(), "/", log):
            pass
    assert log.read_text() == "no memory\n"
