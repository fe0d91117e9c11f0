"""Tiles of the adapter kernels by tokens, rank and shape: the rules, with their reasons.

What bounds them: a decode step reads every adapter's rows once and computes next to nothing with
them, so BGMV has to keep enough bytes under way. Memory of 3 TB/s that answers after 600 ns wants
2 MB, 16 KB a multiprocessor. A segment of many tokens reads its rows once for a whole tile of
tokens; there the activations are what moves, and tensor cores make the products free.

The rules, which need no measurement:
- BGMV shrink reads 4 rows x 512 inputs at a time, 4 KB, expand 8 rows x 512 outputs, 8 KB. Eight
  and more programs fit a multiprocessor: at least twice the bytes that are needed.
- Inputs are split before rows are: a split of the inputs has work whatever rank an adapter has,
  while programs for rows that it does not have start for nothing. So a launch for the highest
  rank that could come, as a captured graph makes it, costs no more programs than another.
- SGMV tiles are short in tokens, 32, or 16 where no segment is longer: to cut tokens finer costs
  one more read of the rows from the cache, while each split of the inputs is one more partial
  sum, which every block of expand's outputs reads again; so there are at most 4 of them. 32 x 128
  sums also leave a thread registers enough for four programs on a multiprocessor, where 64 x 128
  would leave two.
- A block of rank rows in SGMV has 16, the least that a tensor core takes; of inputs and outputs
  it has 256 bytes: two transactions of the memory.
- fp32 has no tensor cores here and takes twice the registers: tiles of 16 tokens.

`make tune-gpu` measures instead; what it finds for a device (`tuned.py`) goes before the rules.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

from kernels.triton.launch import cdiv, next_power_of_2

Method = Literal["bgmv", "sgmv"]

MIN_SGMV_SEGMENT = 16
"""Tokens of one adapter from which a step is SGMV's: then a tile of a tensor core is full.

The other tokens of such a step lose nothing: a tile with one token reads what BGMV would read.
"""
MAX_SPAN_TARGETS = 3  # q, k, v

MAX_SPLITS: dict[Method, int] = {"bgmv": 8, "sgmv": 4}
"""Most partial sums of a rank row; expand reads as many at once, so it is compiled in."""
MIN_SPLIT_INPUTS = 512
WANTED_PROGRAMS: dict[Method, int] = {"bgmv": 2048, "sgmv": 512}
"""Programs of shrink that fill a GPU: of BGMV what 132 multiprocessors hold twice over, since they
are short; of SGMV what they hold once."""


class Tile(NamedTuple):
    """What one program of an adapter kernel has in its registers at a time."""

    tokens: int  # of one segment; 1 for BGMV
    rows: int  # rank rows
    columns: int  # inputs of shrink, outputs of expand
    num_warps: int
    num_stages: int  # rounds of loads that are under way; BGMV's loop has one


class Tiling(NamedTuple):
    """How one span of a step is computed."""

    method: Method
    shrink: Tile
    expand: Tile
    num_splits: int  # of the inputs, each with a partial sum of its own
    row_programs: int  # programs of shrink that share the rank rows of a tile of tokens


class Work(NamedTuple):
    """One span of a step, by what the host knows of it."""

    num_tokens: int  # with an adapter; or padded, as in a captured graph
    num_segments: int
    max_segment: int
    max_span_rows: int
    in_features: int
    out_start: tuple[int, ...]  # as in TargetSpan
    itemsize: int

    @property
    def method(self) -> Method:
        """BGMV gathers for each token, SGMV multiplies tiles of tokens."""
        return "bgmv" if self.max_segment < MIN_SGMV_SEGMENT else "sgmv"

    @property
    def num_rows(self) -> int:
        """Rows that an adapter on all linear layers has in this span, of max_span_rows in q,k,v."""
        return cdiv(self.max_span_rows * (len(self.out_start) - 1), MAX_SPAN_TARGETS)


def rule_tiling(work: Work) -> Tiling:
    """The tiling of `work` by the rules above."""
    shrink, expand = _bgmv_tiles(work) if work.method == "bgmv" else _sgmv_tiles(work)
    return tiling(work, shrink, expand, num_splits(work, shrink))


def tiling(work: Work, shrink: Tile, expand: Tile, splits: int) -> Tiling:
    """These tiles for `work`, and the programs for its rows that fill the GPU beside the splits."""
    beside = num_tiles(work.num_tokens, work.num_segments, shrink.tokens) * splits
    wanted = max(WANTED_PROGRAMS[work.method] // beside, 1)
    row_programs = min(max(cdiv(work.num_rows, shrink.rows), 1), wanted)
    return Tiling(work.method, shrink, expand, splits, row_programs)


def num_tiles(num_tokens: int, num_segments: int, tile_tokens: int) -> int:
    """Programs that cover the tokens: `find_tile` in sgmv.py; at most one a segment is idle."""
    return num_tokens if tile_tokens == 1 else num_tokens // tile_tokens + num_segments


def num_splits(work: Work, shrink: Tile) -> int:
    """Parts of the inputs, none of them empty, that fill the GPU with programs of `shrink`."""
    tiles = num_tiles(work.num_tokens, work.num_segments, shrink.tokens)
    wanted = WANTED_PROGRAMS[work.method] // tiles
    most = min(MAX_SPLITS[work.method], work.in_features // MIN_SPLIT_INPUTS)
    return whole_splits(work.in_features, shrink.columns, max(min(wanted, most), 1))


def whole_splits(in_features: int, columns: int, splits: int) -> int:
    """The number of non-empty parts when `splits` share the rounds of `columns` inputs evenly."""
    rounds = cdiv(in_features, columns)
    return cdiv(rounds, cdiv(rounds, splits))


def _bgmv_tiles(work: Work) -> tuple[Tile, Tile]:
    width = max(stop - start for start, stop in pairwise(work.out_start))
    inputs, outputs = (min(next_power_of_2(n), 512) for n in (work.in_features, width))
    shrink = Tile(1, 4, inputs, num_warps=4 if inputs == 512 else 2, num_stages=1)
    expand = Tile(1, 8, outputs, num_warps=2 if outputs == 512 else 1, num_stages=1)
    return shrink, expand


def _sgmv_tiles(work: Work) -> tuple[Tile, Tile]:
    columns = 256 // work.itemsize
    tokens = 16 if work.max_segment <= 16 or work.itemsize > 2 else 32
    shrink = Tile(tokens, 16, columns, num_warps=4, num_stages=3)
    expand = Tile(tokens, 16, columns, num_warps=4, num_stages=2)
    return shrink, expand
