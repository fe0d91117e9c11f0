"""Pages of the pool get the bytes that they are given, and no other page changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.memory.page_writer import HostPageWriter, host_pages, page_writer, pinned_pages

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_and_reads_into_the_page_that_was_named(device, dtype):
    storage = torch.full((5, 6), 7.0, dtype=dtype, device=device)
    contents = torch.arange(12).to(dtype).view(2, 6)
    num_bytes = 6 * dtype.itemsize
    allocate = pinned_pages if device == "cuda" else host_pages
    pages = allocate(2, num_bytes)
    pages[:] = contents.view(torch.uint8).numpy()
    writer = page_writer(storage)
    writer.write(3, pages[0])
    writer.read(1, lambda out: np.copyto(out, pages[1]))
    writer.wait()
    expected = torch.full((5, 6), 7.0, dtype=dtype)
    expected[3], expected[1] = contents
    assert torch.equal(storage.cpu(), expected)


def test_a_pool_in_host_memory_is_filled_in_place():
    storage = torch.zeros(3, 4)
    seen = []
    HostPageWriter(storage).read(2, seen.append)
    seen[0][:4] = np.array([1.0], np.float32).view(np.uint8)
    assert storage[2, 0] == 1.0, "the bytes went to the page itself, not to a copy"
