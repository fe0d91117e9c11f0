"""What each tenant was served over time, and how far two that both wait drift apart.

The measure of virtual token counters (arXiv:2401.00588, sections 3 and 4); a tenant is an adapter.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from bench.simulation.replay import Run
from server.engine.fairness import INPUT_COST, OUTPUT_COST

Array = NDArray[np.float64]


def largest_gap(run: Run) -> float:
    """Largest difference of two tenants' services in any interval in which both have a queue.

    Service is INPUT_COST for each prompt token, counted at the first token, and OUTPUT_COST for
    each token generated. A tenant has a queue from when a request of it is due to its first token.
    """
    tenants = np.unique(run.trace.adapter)
    moments = np.unique(np.concatenate([t.pieces for t in run.timelines if t.pieces]))
    served = {tenant: _served(run, tenant, moments) for tenant in tenants.tolist()}
    waiting = {tenant: _waiting(run, tenant, moments) for tenant in tenants.tolist()}
    return max(
        (
            _largest_drift(served[a] - served[b], waiting[a] & waiting[b])
            for a, b in combinations(served, 2)
        ),
        default=0.0,
    )


def gap_bound(longest_prompt: int, num_tokens: int) -> float:
    """2 · max(w_in · longest prompt, w_out · tokens that run at once).  (theorem 4.4)"""
    return 2 * max(INPUT_COST * longest_prompt, OUTPUT_COST * num_tokens)


def _served(run: Run, tenant: int, moments: Array) -> Array:
    """Service up to each moment, that moment included."""
    service = np.zeros(len(moments))
    for i in np.flatnonzero(run.trace.adapter == tenant):
        places = np.searchsorted(moments, run.timelines[i].pieces)
        np.add.at(service, places, OUTPUT_COST)
        if len(places):
            service[places[0]] += INPUT_COST * run.trace.num_prompt[i]
    return np.cumsum(service)


def _waiting(run: Run, tenant: int, moments: Array) -> NDArray[np.bool_]:
    """Whether a request of the tenant waits at each moment."""
    change = np.zeros(len(moments) + 1)
    for i in np.flatnonzero(run.trace.adapter == tenant):
        timeline = run.timelines[i]
        until = timeline.pieces[0] if timeline.pieces else timeline.ended
        change[np.searchsorted(moments, timeline.due)] += 1
        change[np.searchsorted(moments, until)] -= 1
    return np.cumsum(change[:-1]) > 0


def _largest_drift(difference: Array, both_wait: NDArray[np.bool_]) -> float:
    """Largest change of `difference` within one run of moments at which both wait.

    What was served in the step that ended at the first of them is in it.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], both_wait, [0]])))
    before = np.concatenate([[0.0], difference])
    drifts = (np.ptp(before[a : b + 1]) for a, b in zip(edges[::2], edges[1::2], strict=True))
    return float(max(drifts, default=0.0))
