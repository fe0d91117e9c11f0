"""Images as files: what is read, what is refused and in which words, and the real thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from server.memory.adapter_pool import AdapterPool
from server.memory.image_loader import ImageError, RankTable, ThreadedImageLoader
from server.memory.page_pool import PagePool
from server.memory.residency import AdapterImage


class Outcome:
    """Waits for the one end of a load."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self.value: RankTable | ImageError | None = None

    def __call__(self, value: RankTable | ImageError) -> None:
        assert not self._ended.is_set(), "a load ends once"
        self.value = value
        self._ended.set()

    def wait(self) -> RankTable | ImageError | None:
        assert self._ended.wait(timeout=30)
        return self.value


@pytest.fixture
def threaded(pool, layout):
    loader = ThreadedImageLoader(pool.storage, layout)
    yield loader
    loader.close()


def load(loader, image, pages) -> RankTable | ImageError | None:
    outcome = Outcome()
    loader.start(image, pages, outcome)
    return outcome.wait()


def test_measures_pages_and_rows(threaded, write_image):
    assert threaded.measure(write_image(num_rows=6)) == (2, 6)


def test_copies_each_page_of_the_image_to_its_page_and_touches_no_other(
    threaded, write_image, pool
):
    pool.storage.fill_(7.0)
    table = load(threaded, write_image(num_rows=12, seed=3), [8, 0, 5])
    expected = torch.randn(3, pool.page_elements, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pool.storage[[8, 0, 5]], expected)
    assert (pool.storage[[1, 2, 3, 4, 6, 7, 9]] == 7.0).all()
    assert isinstance(table, RankTable)
    assert table.row_offset.tolist() == [16 * i for i in range(12)]


def test_an_image_without_rows_is_loaded(threaded, write_image):
    image = write_image(num_rows=0)
    assert threaded.measure(image) == (0, 0)
    assert isinstance(load(threaded, image, []), RankTable)


def test_a_missing_file_is_said_to_be_missing_without_telling_its_path(threaded, tmp_path):
    image = AdapterImage(digest="d1", path=str(tmp_path / "gone"))
    with pytest.raises(ImageError, match="no such file") as caught:
        threaded.measure(image)
    assert str(tmp_path) not in str(caught.value)
    assert "upload" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"stored_digest": "other"}, "its image is that of other", id="digest"),
        pytest.param({"stored_layout": "0123"}, "packed for layout 0123", id="layout"),
        pytest.param({"pages": torch.zeros(2, 32)}, r"shape \[2, 32\]", id="page size"),
        pytest.param({"pages": torch.zeros(2, 64).half()}, "in F16", id="dtype"),
        pytest.param({"row_offset": None}, "cannot be read", id="missing tensor"),
    ],
)
def test_refuses_by_the_header_what_is_not_the_image_asked_for(
    threaded, write_image, changes, message
):
    with pytest.raises(ImageError, match=message):
        threaded.measure(write_image(**changes))


def test_refuses_a_truncated_file(threaded, write_image):
    image = write_image()
    path = Path(image.path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageError, match="cannot be read"):
        threaded.measure(image)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 48, 64, 128])}, id="past the end"),
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 48, 64, -16])}, id="negative"),
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 56, 64, 80])}, id="straddles a page"),
        pytest.param({"row_offset": torch.tensor([0, 16, 32, 44, 64, 80])}, id="unaligned"),
        pytest.param({"row_ptr": torch.full((15,), 6, dtype=torch.int32)}, id="first not 0"),
        pytest.param({"row_ptr": torch.zeros(14, dtype=torch.int32)}, id="too short"),
        pytest.param({"row_scale": torch.ones(5)}, id="scales missing"),
        pytest.param({"row_scale": torch.ones(6).double()}, id="scale dtype"),
    ],
)
def test_a_row_table_that_would_read_elsewhere_is_refused_before_anything_is_copied(
    threaded, write_image, pool, changes
):
    outcome = load(threaded, write_image(**changes), [1, 2])
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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_a_load_starts_one_thread_and_no_team_of_threads(layout, write_image):
    torch.ones(1 << 20).sum()  # this thread's own team
    pool = PagePool(20_000, layout.page_elements, torch.float32, "cpu")
    loader = ThreadedImageLoader(pool.storage, layout)
    before = len(list(Path("/proc/self/task").iterdir()))
    outcome = load(loader, write_image(num_rows=80_000), range(20_000))
    after = len(list(Path("/proc/self/task").iterdir()))
    loader.close()
    assert isinstance(outcome, RankTable)
    assert after == before + 1


def test_the_pool_wakes_its_caller_and_serves_what_the_thread_copied(pool, layout, write_image):
    loaded = threading.Event()
    adapters = AdapterPool(pool, 2, 32, layout, on_loaded=loaded.set)
    assert adapters.request(write_image(num_rows=6, seed=1))
    assert loaded.wait(timeout=30)
    assert adapters.poll() == [("d1", None)]
    adapters.check()
    slot = adapters.acquire("d1")
    assert slot is not None
    offset = int(adapters.rows.row_offset[slot, 5])
    expected = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).view(-1)[80:96]
    assert torch.equal(pool.storage.view(-1)[offset : offset + 16], expected)
    assert adapters.rows.row_scale[slot, :6].tolist() == [2.0] * 6
    adapters.close()


def test_closing_ends_loads_that_have_not_begun(threaded, write_image):
    ended = []
    for i in range(20):
        threaded.start(write_image(f"d{i}"), [i % 5, 5 + i % 5], ended.append)
    threaded.close()
    assert all(isinstance(outcome, RankTable) for outcome in ended)
