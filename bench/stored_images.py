"""Thousands of packed adapters on disk, written quickly: weights by rank, scales by adapter.

One random adapter of each rank goes through the store. The others have its rank rows with signs of
their own on the scales: ΔW = Σ ± scaleᵢ · bᵢ aᵢᵀ is another matrix for each, and so is the digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.engine_session import store_adapters
from server.engine.request import AdapterImage
from server.engine.spec import EngineSpec

SPARE_BYTES = 2 << 30
"""Of the disk, beside the images."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An adapter at rest, and what it takes of a pool."""

    image: AdapterImage
    rank: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """The adapters of a bench; adapter i of a trace is images[i]."""

    templates: list[AdapterImage]  # one of each rank, ascending, their PEFT files in adapter-N
    stored: list[StoredImage]

    @property
    def images(self) -> list[AdapterImage]:
        return [each.image for each in self.stored]

    @property
    def mean_pages(self) -> float:
        return sum(each.num_pages for each in self.stored) / len(self.stored)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(Path(image.path).stat().st_size for image in self.images)


def store_fleet(spec: EngineSpec, ranks: Sequence[int], directory: Path) -> Fleet:
    """An all-linear adapter of each rank in `ranks`, in files under `directory`.

    None of them is left in the system's page cache. OSError where the disk has no room.
    """
    distinct = sorted(set(ranks))
    templates = store_adapters(spec, distinct, directory)
    by_rank = dict(zip(distinct, templates, strict=True))
    sizes = {rank: Path(image.path).stat().st_size for rank, image in by_rank.items()}
    needed = sum(sizes[rank] for rank in ranks) + SPARE_BYTES
    if (free := shutil.disk_usage(directory).free) < needed:
        raise OSError(
            f"{len(ranks)} adapters take {needed:,} bytes of disk with a margin, and {directory} "
            f"has {free:,}: store fewer (--adapters), or set TMPDIR to a larger disk"
        )
    (directory / "fleet").mkdir()
    stored: dict[int, StoredImage] = {}
    for rank, template in by_rank.items():  # one rank's weights are in memory at a time
        places = [i for i, wanted in enumerate(ranks) if wanted == rank]
        stored |= _vary(template, rank, places, directory / "fleet")
    return Fleet(templates, [stored[i] for i in range(len(ranks))])


def forget_cached(image: AdapterImage) -> None:
    """Take an image out of the system's page cache: the next load reads the disk."""
    fd = os.open(image.path, os.O_RDONLY)
    try:
        os.fsync(fd)  # pages that are not written yet cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _vary(
    template: AdapterImage, rank: int, places: Sequence[int], directory: Path
) -> dict[int, StoredImage]:
    """Write the image of adapter i for each i in `places`."""
    tensors = load_file(template.path)
    with safe_open(template.path, framework="pt") as file:
        metadata = dict(file.metadata())
    scale, found = tensors["row_scale"], {}
    for i in places:
        generator = torch.Generator().manual_seed(i)
        signs = 1.0 - 2.0 * torch.randint(2, scale.shape, generator=generator)
        digest = hashlib.sha256(f"{template.digest} {i}".encode()).hexdigest()
        image = AdapterImage(digest, str(directory / f"{i}.safetensors"))
        varied = tensors | {"row_scale": scale * signs}
        save_file(varied, image.path, metadata=metadata | {"digest": digest})
        forget_cached(image)
        found[i] = StoredImage(image, rank, len(tensors["pages"]))
    return found
