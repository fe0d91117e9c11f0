"""The metrics, in Prometheus' format: what the HTTP side counts and what the engine reports.

One registry for each app. Label values come from closed sets, never from what a client chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.request import Load

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_GAUGES: dict[str, tuple[str, Callable[[Load], float]]] = {
    "manylora_requests_running": ("Sequences in the running batch.", lambda x: x.num_running),
    "manylora_requests_waiting": ("Requests waiting for a place.", lambda x: x.num_waiting),
    "manylora_host_pages": (
        "Pages of adapters kept in host memory.",
        lambda x: sum(adapter.num_host_pages for adapter in x.adapters),
    ),
    "manylora_kv_cache_usage_ratio": (
        "Share of the pages that hold KV cache.",
        lambda x: x.num_kv_pages / max(_num_pages(x), 1),
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[Load], float]]] = {
    "manylora_steps": ("Steps of the engine since it started.", lambda x: x.num_steps),
    "manylora_preemptions": (
        "Sequences that gave their pages back and were requeued.",
        lambda x: x.num_preemptions,
    ),
    "manylora_adapter_loads": ("Adapters copied to the device.", lambda x: x.num_adapter_loads),
    "manylora_adapter_evictions": (
        "Idle adapters removed from the device.",
        lambda x: x.num_adapter_evictions,
    ),
    "manylora_adapter_host_loads": (
        "Loads that found their image in host memory.",
        lambda x: x.num_host_loads,
    ),
    "manylora_adapter_cancelled_loads": (
        "Loads that ended early because nobody waited any more.",
        lambda x: x.num_cancelled_loads,
    ),
    "manylora_engine_cached_prompt_tokens": (
        "Prompt tokens that were found in the prefix cache.",
        lambda x: x.num_cached_tokens,
    ),
    "manylora_engine_prompt_tokens": (
        "Prompt tokens that the engine processed, recomputed ones too.",
        lambda x: x.num_prompt_tokens,
    ),
    "manylora_engine_generated_tokens": (
        "Tokens that the engine generated.",
        lambda x: x.num_generated_tokens,
    ),
}


class Metrics:
    """The metric families of one app. `load` gives the engine's newest report, None without one."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(LoadCollector(load))
        self.requests = Counter(
            "manylora_http_requests",
            "HTTP requests answered, by route pattern and status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "manylora_http_disconnects",
            "Requests whose client went away before the end.",
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "manylora_prompt_tokens", "Prompt tokens of answered requests.", registry=self.registry
        )
        self.completion_tokens = Counter(
            "manylora_completion_tokens", "Tokens given to clients.", registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "manylora_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.inter_token_seconds = Histogram(
            "manylora_inter_token_seconds",
            "Between two tokens of one completion.",
            buckets=_INTER_TOKEN_BUCKETS,
            registry=self.registry,
        )

    def exposition(self) -> bytes:
        """The text format of all families, UTF-8."""
        return generate_latest(self.registry)


class LoadCollector(Collector):
    """The engine's report as metrics, read when scraped; counters begin anew with the engine."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        up = GaugeMetricFamily("manylora_engine_up", "1 if the engine has reported.")
        up.add_metric([], float(load is not None))
        yield up
        if load is None:
            return
        for name, (text, value) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=value(load))
        for name, (text, value) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=value(load))
        pages = GaugeMetricFamily("manylora_pages", "Pages of the pool, by use.", labels=["use"])
        pages.add_metric(["kv"], load.num_kv_pages)
        pages.add_metric(["adapter"], load.num_adapter_pages)
        pages.add_metric(["cached"], load.num_cached_pages)
        pages.add_metric(["free"], load.num_free_pages)
        yield pages
        adapters = GaugeMetricFamily(
            "manylora_adapters", "Adapters on the device or in host memory.", labels=["state"]
        )
        for state in ("host", "loading", "resident"):
            adapters.add_metric([state], sum(a.state == state for a in load.adapters))
        yield adapters


def _num_pages(load: Load) -> int:
    num_used = load.num_kv_pages + load.num_adapter_pages
    return load.num_free_pages + load.num_cached_pages + num_used
