"""A toy layout, images of it as files, and a loader whose loads end when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.layout import TARGET_PATHS, BaseLayout, TargetShape
from server.memory.adapter_pool import AdapterPool
from server.memory.host_images import HostImages
from server.memory.image_file import ImageError, ImageSize, RankTable
from server.memory.image_loader import LoadCancelled
from server.memory.page_pool import PagePool
from server.memory.residency import AdapterImage

NUM_LAYERS = 2
ROW = 16  # elements: a [8], b [8]
ROWS_PER_PAGE = 4


class HandLoader:
    """Loads of `path` rows that stay pending until `finish`, `fail` or `stop`."""

    def __init__(self) -> None:
        self.host = HostImages(0, 1)
        self.cancelled: list[str] = []
        self.pending: dict[str, tuple[tuple[int, ...], Callable]] = {}
        self.num_measured = 0

    def measure(self, image: AdapterImage) -> ImageSize:
        self.num_measured += 1
        if image.path == "broken":
            raise ImageError(f"adapter {image.digest}: broken header")
        num_rows = int(image.path)
        return ImageSize(-(-num_rows // ROWS_PER_PAGE), num_rows)

    def start(self, image, pages, finish) -> None:
        assert image.digest not in self.pending, "loaded twice at once"
        self.pending[image.digest] = (tuple(pages), finish)

    def finish(self, digest: str, row_ptr: torch.Tensor | None = None) -> tuple[int, ...]:
        pages, finish = self.pending.pop(digest)
        num_rows = len(pages) * ROWS_PER_PAGE
        if row_ptr is None:
            row_ptr = torch.zeros(NUM_LAYERS * len(TARGET_PATHS) + 1, dtype=torch.int32)
            row_ptr[1:] = num_rows
        finish(RankTable(row_ptr, torch.arange(num_rows) * ROW, torch.full((num_rows,), 0.5)))
        return pages

    def fail(self, digest: str) -> None:
        self.pending.pop(digest)[1](ImageError(f"adapter {digest}: the copy failed"))

    def cancel(self, digest: str) -> None:
        self.cancelled.append(digest)

    def stop(self, digest: str) -> None:
        """What a loader does about a cancel, when it gets to it."""
        self.pending.pop(digest)[1](LoadCancelled(f"adapter {digest}: cancelled"))

    def close(self) -> None:
        self.pending.clear()


@pytest.fixture(scope="session")
def layout() -> BaseLayout:
    targets = tuple(TargetShape(name, 8, 8) for name in TARGET_PATHS)
    return BaseLayout("toy", NUM_LAYERS, targets, ROW * ROWS_PER_PAGE, "float32")


@pytest.fixture
def pool(layout: BaseLayout) -> PagePool:
    return PagePool(10, layout.page_elements, torch.float32, "cpu")


@pytest.fixture(scope="session")
def hand_driven(layout: BaseLayout) -> Callable[..., tuple[AdapterPool, PagePool, HandLoader]]:
    """hand_driven(**options): 3 slots in a new pool of 10 pages, loads by hand."""

    def make(**options) -> tuple[AdapterPool, PagePool, HandLoader]:
        pool = PagePool(10, layout.page_elements, torch.float32, "cpu")
        loader = HandLoader()
        return AdapterPool(pool, 3, 64, layout, loader=loader, **options), pool, loader

    return make


@pytest.fixture
def loader() -> HandLoader:
    return HandLoader()


@pytest.fixture(scope="session")
def make_loader() -> type[HandLoader]:
    return HandLoader


@pytest.fixture
def write_image(tmp_path: Path, layout: BaseLayout) -> Callable[..., AdapterImage]:
    """Write an image of `num_rows` rows, all of layer 0's q_proj, as it should be, or changed."""

    def write(digest: str = "d1", num_rows: int = 6, seed: int = 0, **changes) -> AdapterImage:
        num_pages = -(-num_rows // ROWS_PER_PAGE)
        row_ptr = torch.zeros(NUM_LAYERS * len(TARGET_PATHS) + 1, dtype=torch.int32)
        row_ptr[1:] = num_rows
        values = torch.randn(
            num_pages, layout.page_elements, generator=torch.Generator().manual_seed(seed)
        )
        tensors = {
            "pages": values,
            "row_ptr": row_ptr,
            "row_offset": torch.arange(num_rows) * ROW,
            "row_scale": torch.full((num_rows,), 2.0),
        }
        metadata = {"digest": digest, "layout": layout.key}
        for name, value in changes.items():
            if name.startswith("stored_"):
                metadata[name.removeprefix("stored_")] = value
            elif value is None:
                del tensors[name]
            else:
                tensors[name] = value
        path = tmp_path / f"{digest}.safetensors"
        save_file(tensors, path, metadata=metadata)
        return AdapterImage(digest=digest, path=str(path))

    return write
