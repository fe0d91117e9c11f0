"""A kill at any step of an add or a delete leaves the whole adapter or no trace of it.

One driver process forks a victim for every step; the victim is killed before its n-th call that
reaches the disk, and the driver then opens the store as a restarted server does.
"""

import json
import subprocess
import sys

import msgspec
import pytest

DRIVER = """
import json, os, pathlib, shutil, signal, sys
import msgspec
from adapters_store import admission
from adapters_store.checking import check_adapter
from adapters_store.layout import BaseLayout
from adapters_store.store import AdapterStore

action, work, encoded = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
layout = msgspec.json.decode(encoded, type=BaseLayout)
admission.check = check_adapter
root = work / "store"
steps_left = 0

def open_store(path):
    return AdapterStore(path, layout, max_rank=64, max_pages=None)

def dying(function):
    def run(*arguments, **named):
        global steps_left
        if steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps_left -= 1
        return function(*arguments, **named)
    return run

def act():
    store = open_store(root)
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    connection = store._catalogue._db
    store._catalogue._db = type("Dying", (), {"execute": staticmethod(dying(connection.execute))})
    if action == "add":
        store.add("new", work / "new")
    else:
        store.delete("old")
    os._exit(0)

def state():
    store = open_store(root)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    adapters = {a.adapter_id: a.current.digest for a in store.adapters()}
    for adapter in store.adapters():
        report = check_adapter(root / "files" / adapter.current.digest, layout, max_rank=64)
        assert report.digest == adapter.current.digest
        assert store.image(adapter.current).stat().st_size > report.host_bytes
    store.close()
    return {"adapters": adapters, "files": [f for f in files if f[:2] in ("fi", "im", "tm")]}

template = work / "template"
store = open_store(template)
store.add("old", work / "old")
store.close()
for step in range(200):
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    steps_left = step
    victim = os.fork()
    if victim == 0:
        act()
    killed = os.waitpid(victim, 0)[1] != 0
    print(json.dumps({"killed": killed, **state()}))
    if not killed:
        break
"""


@pytest.fixture
def outcomes(layout, make_adapter, tmp_path):
    def run(action):
        make_adapter(layout, seed=1).write(tmp_path / "old")
        make_adapter(layout, seed=2).write(tmp_path / "new")
        encoded = msgspec.json.encode(layout).decode()
        driver = subprocess.run(
            [sys.executable, "-c", DRIVER, action, str(tmp_path), encoded],
            capture_output=True,
            text=True,
            check=False,
        )
        assert driver.returncode == 0, driver.stderr
        return [json.loads(line) for line in driver.stdout.splitlines()]

    return run


def files_of(adapters, layout):
    return sorted(
        path
        for digest in adapters.values()
        for path in (
            f"files/{digest}/adapter_config.json",
            f"files/{digest}/adapter_model.safetensors",
            f"images/{digest}.{layout.key}.safetensors",
        )
    )


@pytest.mark.parametrize(
    ("action", "before", "after"), [("add", {"old"}, {"old", "new"}), ("delete", {"old"}, set())]
)
def test_a_kill_at_any_step_leaves_the_whole_adapter_or_no_trace(
    outcomes, layout, action, before, after
):
    found = outcomes(action)
    assert len(found) > 10
    assert [outcome["killed"] for outcome in found] == [True] * (len(found) - 1) + [False]
    names = [set(outcome["adapters"]) for outcome in found]
    assert all(state in (before, after) for state in names)
    # Once done it stays done: the change happens at exactly one step.
    assert names == sorted(names, key=lambda state: state == after)
    assert names[0] == before
    assert names[-1] == after
    for outcome in found:
        assert outcome["files"] == files_of(outcome["adapters"], layout)
