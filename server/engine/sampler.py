"""From logits to the next tokens: greedy, or drawn after temperature, top-k, top-p and min-p.

The draw of a token depends on its logits, its request's seed and its position alone, so that a
seeded request has one answer whatever else is in its batch, and after a preemption too. Rows are
computed together, and the host waits for all of them once.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from server.engine.packing import to_device
from server.engine.request import TokenLogprobs
from server.engine.scheduler import SampledToken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from server.engine.packing import Array
    from server.engine.request import Sampling

NUM_CANDIDATES = 256
"""Most probable tokens that are sorted first; all are where top-k, top-p and min-p leave more."""

GREEDY_BLOCK = 128
"""Tokens of a block of the vocabulary in the search for the largest logit on a CPU."""


class Draw(NamedTuple):
    """How one row of logits becomes a token."""

    sampling: Sampling
    position: int  # of the token to come, in its sequence


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """One token for each row of logits [N, vocab].

    Log-probabilities, where a request asks for them, are those of the logits as they are, before
    temperature and truncation. The host waits for the device once, and once more if a row turns
    out to need more candidates than were sorted.
    """
    if not draws:
        return []
    if not any(s.temperature > 0 or s.num_logprobs is not None for s, _ in draws):
        return [SampledToken(token_id) for token_id in _most_probable(logits).tolist()]
    tokens, unsettled = _sample(logits, draws, NUM_CANDIDATES)
    if unsettled:
        rows = _upload(unsettled, logits.device)
        again, _ = _sample(_select(logits, rows), [draws[n] for n in unsettled], logits.shape[1])
        for n, token in zip(unsettled, again, strict=True):
            tokens[n] = token
    return tokens


def _sample(
    logits: Tensor, draws: Sequence[Draw], num_candidates: int
) -> tuple[list[SampledToken], list[int]]:
    """A token for each row, and the rows whose token does not count: they need more candidates."""
    token_ids, unsettled = _choose(logits, draws, num_candidates)
    wanted = [n for n, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]
    found = _logprobs(logits, token_ids, draws, wanted) if wanted else []
    chosen, is_unsettled, *found_there = _fetch([token_ids, unsettled, *found])
    logprobs = {}
    for n, *row in zip(wanted, *found_there, strict=True) if wanted else ():
        own, top_ids, top_logprobs = (values.tolist() for values in row)
        count = draws[n].sampling.num_logprobs
        logprobs[n] = TokenLogprobs(
            chosen=own,
            top_ids=tuple(int(token_id) for token_id in top_ids[:count]),
            top_logprobs=tuple(top_logprobs[:count]),
        )
    tokens = [SampledToken(int(token_id), logprobs.get(n)) for n, token_id in enumerate(chosen)]
    return tokens, np.flatnonzero(is_unsettled).tolist()


def _fetch(parts: Sequence[Tensor]) -> list[Array]:
    """The parts on the host, as fp64, which holds token ids and fp32 exactly; waits once."""
    flat = torch.cat([part.flatten().double() for part in parts]).cpu().numpy()
    bounds = accumulate((part.numel() for part in parts), initial=0)
    return [
        flat[start:stop].reshape(part.shape)
        for (start, stop), part in zip(pairwise(bounds), parts, strict=True)
    ]


def _choose(logits: Tensor, draws: Sequence[Draw], num_candidates: int) -> tuple[Tensor, Tensor]:
    """The token id of each row, [N] int64, and whether it needs more candidates, [N] bool."""
    vocab = logits.shape[1]
    groups: dict[int, list[int]] = {}
    for n, draw in enumerate(draws):
        if draw.sampling.temperature > 0:
            count = min(_num_sorted(draw.sampling, num_candidates), vocab)
            groups.setdefault(count, []).append(n)
    num_rows = len(draws)
    if sum(map(len, groups.values())) == num_rows:  # nothing is greedy
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    else:
        token_ids = _most_probable(logits)
    unsettled = torch.zeros(num_rows, dtype=torch.bool, device=logits.device)
    for count, group in groups.items():
        by = to_device(_parameters(group, [draws[n] for n in group], vocab), logits.device)
        drawn, is_unsettled = _draw(_select(logits, by["rows"]), by, count)
        token_ids.index_copy_(0, by["rows"], drawn)
        unsettled.index_copy_(0, by["rows"], is_unsettled)
    return token_ids, unsettled


def _most_probable(logits: Tensor) -> Tensor:
    """The first index of each row's largest logit, [N] int64.

    On a CPU torch looks for the index without vector instructions: it is left with one block of
    the vocabulary, found by the blocks' maxima.
    """
    num_rows, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % GREEDY_BLOCK:
        return logits.argmax(dim=-1)
    blocks = logits.view(num_rows, -1, GREEDY_BLOCK)
    best = blocks.amax(dim=-1).argmax(dim=-1)  # [N]
    inside = blocks[torch.arange(num_rows), best].argmax(dim=-1)
    return best * GREEDY_BLOCK + inside


def _num_sorted(sampling: Sampling, num_candidates: int) -> int:
    """How many of the most probable tokens are sorted for a row; a power of two for a large top-k,
    so that few numbers come together.
    """
    if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0:
        return 0
    return max(num_candidates, 1 << max(0, sampling.top_k - 1).bit_length())


def _parameters(rows: Sequence[int], draws: Sequence[Draw], vocab: int) -> dict[str, Array]:
    """What `_draw` needs of rows: their numbers [n], and columns [n, 1]."""
    sampling = [draw.sampling for draw in draws]
    # A temperature that fp32 cannot hold would divide 0 by 0.
    tiny = float(np.finfo(np.float32).tiny)
    columns: dict[str, Array] = {
        "temperature": np.array([max(s.temperature, tiny) for s in sampling], dtype=np.float32),
        "top_k": np.array([min(s.top_k or vocab, vocab) for s in sampling]),
        "top_p": np.array([s.top_p if s.top_p < 1 else np.inf for s in sampling], dtype=np.float32),
        "min_p": np.array([s.min_p for s in sampling], dtype=np.float32),
        "uniform": np.array([_uniform(d.sampling.seed, d.position) for d in draws]),
    }
    return {"rows": np.array(rows), **{name: c[:, None] for name, c in columns.items()}}


def _uniform(seed: int, position: int) -> float:
    """The request's random number in [0, 1) for a position (Philox, counter-based)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _upload(rows: Sequence[int], device: torch.device) -> Tensor:
    return to_device({"rows": np.array(rows)}, device)["rows"]


def _select(logits: Tensor, rows: Tensor) -> Tensor:
    """Those rows, which rise, in fp32; all of them are not copied."""
    return (logits if len(rows) == len(logits) else logits[rows]).float()


def _draw(logits: Tensor, by: dict[str, Tensor], num_sorted: int) -> tuple[Tensor, Tensor]:
    """A token id for each row of logits [n, vocab] fp32, and whether it needs more candidates.

    num_sorted = 0: no row truncates. Both results are [n].
    """
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / by["temperature"]
    probabilities = scaled.softmax(dim=-1)
    if num_sorted == 0:
        token_ids = _inverse(probabilities, by["uniform"])
        return token_ids[:, 0], torch.zeros_like(token_ids[:, 0], dtype=torch.bool)
    if num_sorted == logits.shape[1]:
        values, indices = probabilities.sort(dim=-1, descending=True)
    else:
        values, indices = probabilities.topk(num_sorted)
    num_kept = _num_kept(values, by)  # [n, 1]
    rank = torch.arange(num_sorted, device=logits.device)
    kept = values.masked_fill(rank >= num_kept, 0)
    token_ids = indices.gather(1, _inverse(kept, by["uniform"]))
    needs_more = (num_kept == num_sorted) & (by["top_k"] > num_sorted)
    return token_ids[:, 0], needs_more[:, 0]


def _num_kept(values: Tensor, by: dict[str, Tensor]) -> Tensor:
    """How many of falling probabilities [n, c] top-k, then top-p, then min-p leave, [n, 1]."""
    num_sorted = values.shape[1]
    rank = torch.arange(num_sorted, device=values.device)
    num_kept = by["top_k"].clamp(max=num_sorted)
    values = values.masked_fill(rank >= num_kept, 0)
    cumulated = values.cumsum(dim=-1)
    # Over what top-k left; a token stays while those before it hold less than top_p. Without
    # top-k the candidates' missing mass is counted: the whole sums to 1.
    whole = torch.where(by["top_k"] > num_sorted, 1.0, cumulated[:, -1:])
    for enough in (
        cumulated - values < by["top_p"] * whole,
        values >= by["min_p"] * values[:, :1],
    ):
        num_enough = enough.sum(dim=-1, keepdim=True).clamp(min=1)
        num_kept = torch.minimum(num_kept, num_enough)
    return num_kept


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """In each row [n, c] the index whose share of the weights holds `uniform` in [0, 1), [n, 1].

    One without weight never.
    """
    # In fp32 the highest targets would round up to the sum, and so to the last index.
    cumulated = weights.cumsum(dim=-1, dtype=torch.double)
    index = torch.searchsorted(cumulated, cumulated[:, -1:] * uniform, right=True)
    return index.clamp(max=weights.shape[1] - 1)


def _logprobs(
    logits: Tensor, token_ids: Tensor, draws: Sequence[Draw], wanted: Sequence[int]
) -> list[Tensor]:
    """Of the rows `wanted`: the chosen token's log-probability [w], the top ids and theirs."""
    rows = _upload(wanted, logits.device)
    logprobs = _select(logits, rows).log_softmax(dim=-1)
    count = max(draws[n].sampling.num_logprobs or 0 for n in wanted)
    top_logprobs, top_ids = logprobs.topk(count)
    return [logprobs.gather(1, token_ids[rows, None])[:, 0], top_ids, top_logprobs]
