"""From logits to the next tokens: greedy, or drawn after temperature, top-k, top-p and min-p.

The draw of a token depends on its logits, its request's seed and its position alone, so that a
seeded request has one answer whatever else is in its batch, and after a preemption too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from server.engine.request import TokenLogprobs
from server.engine.scheduler import SampledToken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from server.engine.request import Sampling

NUM_CANDIDATES = 256
"""Most probable tokens that are sorted first; all are where top-k, top-p and min-p leave more."""


class Draw(NamedTuple):
    """How one row of logits becomes a token."""

    sampling: Sampling
    position: int  # of the token to come, in its sequence


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """One token for each row of logits [N, vocab] fp32.

    Log-probabilities, where a request asks for them, are those of the logits as they are, before
    temperature and truncation.
    """
    if not draws:
        return []
    token_ids = logits.argmax(dim=-1)
    drawn = [n for n, draw in enumerate(draws) if draw.sampling.temperature > 0]
    for n in drawn:
        token_ids[n] = _draw(logits[n], draws[n])
    logprobs = _logprobs(logits, token_ids, draws)
    return [
        SampledToken(token_id, logprobs.get(n)) for n, token_id in enumerate(token_ids.tolist())
    ]


def _draw(logits: Tensor, draw: Draw) -> Tensor:
    """A token id from one row of logits [vocab], as its request wants it."""
    sampling = draw.sampling
    # A temperature that fp32 cannot hold would divide 0 by 0.
    temperature = max(sampling.temperature, torch.finfo(torch.float).tiny)
    scaled = (logits - logits.max()) / temperature
    probabilities = scaled.softmax(dim=-1)
    uniform = _uniform(sampling.seed, draw.position)
    if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0:
        return _inverse(probabilities, uniform)
    count = len(probabilities)
    if sampling.top_k <= NUM_CANDIDATES:
        count = min(NUM_CANDIDATES, count)
    values, indices = probabilities.topk(count)
    kept = _truncate(values, sampling)
    if len(kept) == count < len(probabilities):
        values, indices = probabilities.sort(descending=True)
        kept = _truncate(values, sampling)
    return indices[_inverse(kept, uniform)]


def _truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """The leading ones of falling probabilities that top-k, then top-p, then min-p leave."""
    if sampling.top_k > 0:
        probabilities = probabilities[: sampling.top_k]
    if sampling.top_p < 1:
        # Over what top-k left; a token stays while those before it hold less than top_p. Without
        # top-k the candidates' missing mass is counted: the whole sums to 1.
        whole = probabilities.sum() if sampling.top_k > 0 else 1.0
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities[: max(1, int((before < sampling.top_p * whole).sum()))]
    if sampling.min_p > 0:
        enough = probabilities >= sampling.min_p * probabilities[0]
        probabilities = probabilities[: max(1, int(enough.sum()))]
    return probabilities


def _inverse(weights: Tensor, uniform: float) -> Tensor:
    """The index whose share of the weights holds `uniform` in [0, 1); one without weight never."""
    # In fp32 the highest targets would round up to the sum, and so to the last index.
    cumulated = weights.cumsum(dim=-1, dtype=torch.double)
    target = (cumulated[-1] * uniform).reshape(1)
    index = torch.searchsorted(cumulated, target, right=True)[0]
    return index.clamp(max=len(cumulated) - 1)


def _uniform(seed: int, position: int) -> float:
    """The request's random number in [0, 1) for a position (Philox, counter-based)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _logprobs(logits: Tensor, token_ids: Tensor, draws: Sequence[Draw]) -> dict[int, TokenLogprobs]:
    """By row, for the rows whose request wants them."""
    wanted = [n for n, draw in enumerate(draws) if draw.sampling.num_logprobs is not None]
    if not wanted:
        return {}
    logprobs = logits[wanted].log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[wanted, None])[:, 0].tolist()
    count = max(draws[n].sampling.num_logprobs or 0 for n in wanted)
    top_logprobs, top_ids = (part.tolist() for part in logprobs.topk(count))
    results = {}
    for row, n in enumerate(wanted):
        own = draws[n].sampling.num_logprobs
        results[n] = TokenLogprobs(
            chosen=chosen[row],
            top_ids=tuple(top_ids[row][:own]),
            top_logprobs=tuple(top_logprobs[row][:own]),
        )
    return results
