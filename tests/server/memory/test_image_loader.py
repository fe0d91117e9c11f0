"""The threads that load: what they copy, how they end early, and that none waits for another."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from server.memory import image_loader
from server.memory.adapter_pool import AdapterPool
from server.memory.image_file import ImageError, ImageFile, ImageSize, RankTable
from server.memory.image_loader import LoadCancelled, LoadLimits, ThreadedImageLoader
from server.memory.page_pool import PagePool
from server.memory.residency import AdapterImage

WAIT_SECONDS = 30  # a limit for a test that fails; nothing that passes waits for it


class Outcome:
    """Waits for the one end of a load."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self.value: RankTable | ImageError | None = None

    def __call__(self, value: RankTable | ImageError) -> None:
        assert not self._ended.is_set(), "a load ends once"
        self.value = value
        self._ended.set()

    @property
    def has_come(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> RankTable | ImageError | None:
        assert self._ended.wait(WAIT_SECONDS)
        return self.value


class Gate:
    """Holds every read of a page of one image until it is opened."""

    def __init__(self, monkeypatch, digest: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.num_reads = 0
        read_page = ImageFile.read_page

        def read(file, index, out) -> None:
            if file._image.digest == digest:
                self.num_reads += 1
                self.reached.set()
                assert self.opened.wait(WAIT_SECONDS)
            read_page(file, index, out)

        monkeypatch.setattr(ImageFile, "read_page", read)


class Loaders:
    """Makes loaders, and ends their threads."""

    def __init__(self, pool, layout) -> None:
        self._pool, self._layout = pool, layout
        self._made: list[ThreadedImageLoader] = []

    def __call__(self, **limits) -> ThreadedImageLoader:
        loader = ThreadedImageLoader(self._pool.storage, self._layout, LoadLimits(**limits))
        self._made.append(loader)
        return loader

    def close(self) -> None:
        while self._made:
            self._made.pop().close()


@pytest.fixture
def make_loader(pool, layout):
    """make_loader(**limits): a loader whose threads are ended after the test."""
    loaders = Loaders(pool, layout)
    yield loaders
    loaders.close()


@pytest.fixture
def threaded(make_loader):
    return make_loader()


class HungImage:
    """An image whose file cannot be opened until it is let go: a pipe without a writer."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.image = AdapterImage(digest="hung", path=str(path))
        self.writers: list[int] = []

    def let_go(self) -> None:
        """Who opens it from now on does not wait, and neither does who waits."""
        self.writers.append(os.open(self.image.path, os.O_RDWR | os.O_NONBLOCK))


@pytest.fixture
def hung(make_loader, tmp_path):
    """Let go after the test; the threads that wait for it end before it does."""
    hung = HungImage(tmp_path / "hung")
    yield hung
    hung.let_go()
    make_loader.close()
    for writer in hung.writers:
        os.close(writer)


def begun(loader, image, pages) -> Outcome:
    outcome = Outcome()
    loader.start(image, pages, outcome)
    return outcome


def load(loader, image, pages) -> RankTable | ImageError | None:
    return begun(loader, image, pages).wait()


def values(seed: int, num_pages: int, page_elements: int) -> torch.Tensor:
    return torch.randn(num_pages, page_elements, generator=torch.Generator().manual_seed(seed))


# What is copied.


@pytest.mark.parametrize("host_pages", [0, 3])
def test_copies_each_page_of_the_image_to_its_page_and_touches_no_other(
    make_loader, write_image, pool, host_pages
):
    pool.storage.fill_(7.0)
    loader = make_loader(host_bytes=host_pages * pool.page_bytes)
    table = load(loader, write_image(num_rows=12, seed=3), [8, 0, 5])
    assert torch.equal(pool.storage[[8, 0, 5]], values(3, 3, pool.page_elements))
    assert (pool.storage[[1, 2, 3, 4, 6, 7, 9]] == 7.0).all()
    assert isinstance(table, RankTable)
    assert table.row_offset.tolist() == [16 * i for i in range(12)]


def test_an_image_without_rows_is_loaded(threaded, write_image):
    image = write_image(num_rows=0)
    assert threaded.measure(image) == (0, 0)
    assert isinstance(load(threaded, image, []), RankTable)


def test_a_bad_row_table_is_refused_before_anything_is_copied(threaded, write_image, pool):
    outcome = load(threaded, write_image(row_scale=torch.ones(5)), [1, 2])
    assert isinstance(outcome, ImageError)
    assert "row table" in str(outcome)
    assert not pool.storage.any()


def test_a_file_that_goes_away_after_it_was_measured_fails_the_load(threaded, write_image):
    image = write_image()
    threaded.measure(image)
    Path(image.path).unlink()
    outcome = load(threaded, image, [1, 2])
    assert isinstance(outcome, ImageError)
    assert "no such file" in str(outcome)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"num_rows": 12}, "has 3 pages now, 2 before", id="size"),
        pytest.param({"stored_digest": "other"}, "is that of other", id="digest"),
    ],
)
def test_a_file_that_is_another_after_it_was_measured_fails_the_load(
    threaded, write_image, pool, changes, message
):
    image = write_image()
    threaded.measure(image)
    write_image(**changes)
    outcome = load(threaded, image, [1, 2])
    assert isinstance(outcome, ImageError)
    assert message in str(outcome)
    assert not pool.storage.any()


def test_an_unforeseen_fault_fails_its_own_load_and_the_thread_goes_on(
    make_loader, write_image, monkeypatch, caplog
):
    loader = make_loader(num_threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "read_page", lambda *_: 1 // 0)
        outcome = load(loader, write_image("d1"), [1, 2])
    assert "cannot be loaded (ZeroDivisionError)" in str(outcome)
    assert "the load of adapter d1 failed" in caplog.text
    assert isinstance(load(loader, write_image("d2"), [1, 2]), RankTable)


def test_the_pool_wakes_its_caller_and_serves_what_the_thread_copied(pool, layout, write_image):
    loaded = threading.Event()
    adapters = AdapterPool(pool, 2, 32, layout, on_loaded=loaded.set)
    assert adapters.request(write_image(num_rows=6, seed=1))
    assert loaded.wait(WAIT_SECONDS)
    assert adapters.poll() == [("d1", None)]
    adapters.check()
    slot = adapters.acquire("d1")
    assert slot is not None
    offset = int(adapters.rows.row_offset[slot, 5])
    expected = values(1, 2, 64).view(-1)[80:96]
    assert torch.equal(pool.storage.view(-1)[offset : offset + 16], expected)
    assert adapters.rows.row_scale[slot, :6].tolist() == [2.0] * 6
    adapters.close()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_loads_start_their_threads_and_no_team_of_threads(layout, write_image):
    torch.ones(1 << 20).sum()  # this thread's own team
    pool = PagePool(20_000, layout.page_elements, torch.float32, "cpu")
    before = len(list(Path("/proc/self/task").iterdir()))
    limits = LoadLimits(num_threads=3, host_bytes=10_000 * pool.page_bytes)
    loader = ThreadedImageLoader(pool.storage, layout, limits)
    outcomes = [
        begun(loader, write_image(f"d{i}", num_rows=20_000), range(5000 * i, 5000 * (i + 1)))
        for i in range(4)
    ]
    assert all(isinstance(outcome.wait(), RankTable) for outcome in outcomes)
    after = len(list(Path("/proc/self/task").iterdir()))
    loader.close()
    assert after == before + 3


# Loads beside each other.


def test_a_read_that_hangs_stops_no_other_load(threaded, hung, write_image):
    outcome = begun(threaded, hung.image, [0])
    for i in range(5):
        assert isinstance(load(threaded, write_image(f"d{i}"), [1, 2]), RankTable)
    assert not outcome.has_come
    hung.let_go()
    assert "cannot be read" in str(outcome.wait())


def test_requests_of_a_load_that_hangs_are_told_and_its_pages_stay_its_own(
    pool, layout, threaded, hung, monkeypatch
):
    now = [0.0]
    ended = threading.Event()
    adapters = AdapterPool(
        pool, 2, 32, layout,
        loader=threaded, load_timeout_seconds=5.0, on_loaded=ended.set, clock=lambda: now[0],
    )  # fmt: skip
    monkeypatch.setattr(threaded, "measure", lambda image: ImageSize(3, 12))
    assert adapters.request(hung.image)
    now[0] = 5.0
    ((digest, error),) = adapters.poll()
    assert (digest, "longer than 5 s" in error) == ("hung", True)
    assert pool.num_free == 7
    hung.let_go()
    assert ended.wait(WAIT_SECONDS)
    assert adapters.poll() == []
    assert pool.num_free == 10
    adapters.check()


# Cancels.


def test_a_cancelled_load_ends_before_its_next_page(threaded, write_image, monkeypatch, pool):
    gate = Gate(monkeypatch, "d1")
    outcome = begun(threaded, write_image(num_rows=12), [1, 2, 3])
    assert gate.reached.wait(WAIT_SECONDS)
    threaded.cancel("d1")
    assert not outcome.has_come, "its thread may still write"
    gate.opened.set()
    assert isinstance(outcome.wait(), LoadCancelled)
    assert gate.num_reads == 1
    assert not pool.storage[[2, 3]].any()


def test_a_load_that_no_thread_has_begun_is_cancelled_at_once(make_loader, hung, write_image):
    loader = make_loader(num_threads=1)
    begun(loader, hung.image, [0])
    outcome = begun(loader, write_image("d1"), [1, 2])
    loader.cancel("d1")
    assert isinstance(outcome.value, LoadCancelled)
    again = begun(loader, write_image("d1"), [3, 4])
    hung.let_go()
    assert isinstance(again.wait(), RankTable)


def test_a_cancel_of_what_is_not_loading_is_ignored(threaded, write_image):
    threaded.cancel("unknown")
    assert isinstance(load(threaded, write_image(), [1, 2]), RankTable)
    threaded.cancel("d1")
    assert isinstance(load(threaded, write_image(), [1, 2]), RankTable)


def test_a_load_waits_for_its_share_of_the_bytes_and_a_cancel_ends_the_wait(
    make_loader, write_image, monkeypatch
):
    gate = Gate(monkeypatch, "d1")
    gate.opened.set()
    loader = make_loader(bytes_per_second=1)
    outcome = begun(loader, write_image(num_rows=12), [1, 2, 3])
    assert gate.reached.wait(WAIT_SECONDS)
    loader.cancel("d1")
    assert isinstance(outcome.wait(), LoadCancelled)
    assert gate.num_reads == 1, "the second page had to wait for minutes"


def test_closing_stops_what_goes_on_begins_nothing_and_tells_nobody(
    make_loader, hung, write_image, monkeypatch, pool
):
    monkeypatch.setattr(image_loader, "CLOSE_SECONDS", 0.01)
    loader = make_loader(num_threads=1)
    outcomes = [begun(loader, hung.image, [0]), begun(loader, write_image("d1"), [1, 2])]
    loader.close()
    monkeypatch.undo()
    hung.let_go()
    loader.close()
    assert not any(outcome.has_come for outcome in outcomes)
    assert not pool.storage.any()


# The tier in host memory.


def test_an_image_in_host_memory_is_not_read_again(make_loader, write_image, pool):
    loader = make_loader(host_bytes=3 * pool.page_bytes)
    image = write_image(num_rows=12, seed=5)
    load(loader, image, [0, 1, 2])
    Path(image.path).unlink()
    pool.storage.zero_()
    table = load(loader, image, [9, 4, 6])
    assert isinstance(table, RankTable)
    assert torch.equal(pool.storage[[9, 4, 6]], values(5, 3, pool.page_elements))
    assert loader.host.num_hits == 1
    loader.host.check()


def test_an_image_that_finds_no_room_in_host_memory_is_read_past_it(make_loader, write_image, pool):
    loader = make_loader(host_bytes=2 * pool.page_bytes)
    assert isinstance(load(loader, write_image(num_rows=12, seed=5), [0, 1, 2]), RankTable)
    assert torch.equal(pool.storage[:3], values(5, 3, pool.page_elements))
    assert loader.host.num_pages_by_digest() == {}


def test_what_was_not_read_whole_does_not_stay_in_host_memory(
    make_loader, write_image, monkeypatch, pool
):
    loader = make_loader(host_bytes=3 * pool.page_bytes)
    image = write_image(num_rows=12, seed=5)
    with monkeypatch.context() as patch:
        gate = Gate(patch, "d1")
        outcome = begun(loader, image, [0, 1, 2])
        assert gate.reached.wait(WAIT_SECONDS)
        loader.cancel("d1")
        gate.opened.set()
        assert isinstance(outcome.wait(), LoadCancelled)
    loader.host.check()
    assert loader.host.num_pages_by_digest() == {}
    assert isinstance(load(loader, image, [0, 1, 2]), RankTable)
    assert loader.host.num_pages_by_digest() == {"d1": 3}
    assert torch.equal(pool.storage[:3], values(5, 3, pool.page_elements))


def test_a_file_cut_off_in_the_middle_of_its_load_fails_it_and_leaves_no_copy(
    make_loader, write_image, monkeypatch, pool
):
    loader = make_loader(host_bytes=3 * pool.page_bytes)
    image = write_image(num_rows=12)
    gate = Gate(monkeypatch, "d1")
    outcome = begun(loader, image, [0, 1, 2])
    assert gate.reached.wait(WAIT_SECONDS)
    os.truncate(image.path, Path(image.path).stat().st_size - 2 * pool.page_bytes)
    gate.opened.set()
    assert "the file ends at byte" in str(outcome.wait())
    assert loader.host.num_pages_by_digest() == {}
    loader.host.check()


def test_the_report_tells_the_tier_of_each_adapter_and_a_drop_frees_both(
    pool, layout, make_loader, write_image
):
    loader = make_loader(host_bytes=4 * pool.page_bytes)
    ended = threading.Semaphore(0)
    adapters = AdapterPool(pool, 2, 32, layout, loader=loader, on_loaded=ended.release)
    for digest in ("a", "b"):
        adapters.request(write_image(digest))
        assert ended.acquire(timeout=WAIT_SECONDS)
    adapters.poll()
    adapters.evict("a")
    tiers = {a.digest: (a.state, a.num_pages, a.num_host_pages) for a in adapters.report()}
    assert tiers == {"a": ("host", 0, 2), "b": ("resident", 2, 2)}
    adapters.request(write_image("a"))
    assert ended.acquire(timeout=WAIT_SECONDS)
    adapters.poll()
    assert adapters.num_host_loads == 1
    adapters.evict("a")
    assert adapters.drop("a") == 0
    assert adapters.drop("b") == 2 * pool.page_bytes
    assert adapters.report() == ()
