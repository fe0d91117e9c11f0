"""The adapters of a simulated workload: their ranks, and what they take of pages and of the link.

Sizes are those that the store's packing gives for the model's real shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from adapters_store.packing import pack_rows, row_sizes
from bench.workloads import BASE
from server.engine.request import AdapterImage
from server.roofline.shapes import ITEM_BYTES, ModelShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The targets that S-LoRA's adapters have.  (slora/models/peft, w_combined [2, 4 r, ...])"""

LLAMA_7B = ModelShape("Llama-7B", 32, 4096, 11008, 32, 32, 128, 32000, 4096)
LLAMA_13B = ModelShape("Llama-13B", 40, 5120, 13824, 40, 40, 128, 32000, 4096)


class Kind(NamedTuple):
    """Adapters of one rank."""

    rank: int
    num_pages: int
    num_bytes: int  # of its pages: a load copies them whole


class Fleet:
    """`num_adapters` adapters of one model, addressed by number as in a trace."""

    def __init__(
        self, shape: ModelShape, ranks: Sequence[int], targets: Sequence[str] | None = None
    ) -> None:
        """ranks: of each adapter. targets: what all of them change; None: all seven projections.

        Raises ValueError for a target that the model has not.
        """
        names = [target.name for target in shape.targets]
        self.targets = tuple(names if targets is None else targets)
        if unknown := set(self.targets) - set(names):
            raise ValueError(f"{sorted(unknown)} are no targets: the model has {', '.join(names)}")
        self.shape = shape
        self._kinds = {rank: self._kind(rank) for rank in set(ranks)}
        self._ranks = list(ranks)
        self._images = [AdapterImage(digest=f"adapter-{i}", path=str(i)) for i in range(len(ranks))]

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def largest(self) -> Kind:
        """The kind with most pages."""
        return max(self._kinds.values(), key=lambda kind: kind.num_pages)

    def image(self, adapter: int) -> AdapterImage | None:
        """What a request names; None for BASE."""
        return None if adapter == BASE else self._images[adapter]

    def kind(self, image: AdapterImage) -> Kind:
        """Of an image that `image` returned."""
        return self._kinds[self._ranks[int(image.path)]]

    def _kind(self, rank: int) -> Kind:
        layout = self.shape.layout()
        ranks = {(n, name): rank for n in range(layout.num_layers) for name in self.targets}
        num_pages = pack_rows(row_sizes(layout, ranks), layout.page_elements).num_pages
        return Kind(rank, num_pages, num_pages * layout.page_elements * ITEM_BYTES)
