"""Virtual time, and loads that take as much of it as their bytes take on the link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench.simulation.fleet import Fleet
from bench.simulation.machine import Machine
from server.memory.host_images import HostImages
from server.memory.image_file import ImageError, ImageSize, RankTable
from server.memory.image_loader import LoadCancelled
from server.memory.residency import AdapterImage


class VirtualClock:
    """Seconds since the start of the simulation; it goes where it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def advance_to(self, moment: float) -> None:
        """Never goes back."""
        self.now = max(self.now, moment)


class _Copy(NamedTuple):
    digest: str
    ends: float
    table: RankTable
    finish: Callable[[RankTable | ImageError], None]


class SimulatedLoader:
    """An ImageLoader whose copies end in virtual time, one after another on one link.

    Moves nothing: an image has one row in each of its pages, enough for the pool to check that no
    row lies outside of them.
    """

    def __init__(
        self, fleet: Fleet, machine: Machine, clock: VirtualClock, num_entries: int, stride: int
    ) -> None:
        """num_entries: (layer, target) pairs of the pool's layout; stride: elements of a page."""
        self.num_bytes = 0  # copied so far
        self.host = HostImages(0, 1)  # every image is there already: the machine's assumption
        self._fleet = fleet
        self._machine = machine
        self._clock = clock
        self._num_entries, self._stride = num_entries, stride
        self._tables: dict[int, RankTable] = {}
        self._link_free_at = 0.0
        self._under_way: list[_Copy] = []  # in the order in which they end

    @property
    def next_end(self) -> float | None:
        """When the next copy ends; None without one."""
        return self._under_way[0].ends if self._under_way else None

    def deliver(self) -> None:
        """Finish the copies that have ended by now."""
        while self._under_way and self._under_way[0].ends <= self._clock.now:
            copy = self._under_way.pop(0)
            copy.finish(copy.table)

    def measure(self, image: AdapterImage) -> ImageSize:
        num_pages = self._fleet.kind(image).num_pages
        return ImageSize(num_pages, num_pages)

    def start(
        self,
        image: AdapterImage,
        pages: Sequence[int],
        finish: Callable[[RankTable | ImageError], None],
    ) -> None:
        num_bytes = self._fleet.kind(image).num_bytes
        began = max(self._clock.now, self._link_free_at)
        self._link_free_at = began + num_bytes / self._machine.load_bytes_per_second
        self.num_bytes += num_bytes
        ends = self._link_free_at + self._machine.assumed.load_seconds
        self._under_way.append(_Copy(image.digest, ends, self._table(len(pages)), finish))

    def cancel(self, digest: str) -> None:
        """At once; the link's time is not given back."""
        for copy in [copy for copy in self._under_way if copy.digest == digest]:
            self._under_way.remove(copy)
            copy.finish(LoadCancelled(f"adapter {digest}: cancelled"))

    def close(self) -> None:
        self._under_way.clear()

    def _table(self, num_pages: int) -> RankTable:
        if num_pages not in self._tables:
            row_ptr = torch.full((self._num_entries + 1,), num_pages, dtype=torch.int32)
            row_ptr[0] = 0
            offsets = torch.arange(num_pages) * self._stride
            self._tables[num_pages] = RankTable(row_ptr, offsets, torch.ones(num_pages))
        return self._tables[num_pages]
