"""What /health, /ready, /version, /metrics and the page promise."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from server.engine.request import Load, ResidentAdapter


def samples_of(server):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_is_alive_even_while_the_engine_starts(server):
    server.engine.started = None
    assert server.client.get("/health").status_code == 200


def test_is_ready_only_when_the_engine_is(server, kit):
    assert server.client.get("/ready").json() == {
        "status": "ready",
        "model": kit.model,
        "max_context": kit.max_context,
    }
    server.engine.started = None
    kit.assert_error(server.client.get("/ready"), 503, "engine_unavailable", None)


def test_names_its_version_and_model(server, kit):
    body = server.client.get("/version").json()
    assert re.fullmatch(r"\d+\.\d+\.\d+", body["version"])
    assert body["model"] == kit.model


def test_counts_requests_by_route_pattern_and_status(server):
    server.chat()
    server.chat(adapter_id="secret-tenant")
    server.client.get("/v1/adapters/secret-tenant")
    server.client.get("/secret-path")
    samples = samples_of(server)
    name = "manylora_http_requests_total"
    assert samples[name, "/v1/chat/completions", "200"] == 1
    assert samples[name, "/v1/chat/completions", "404"] == 1
    assert samples[name, "/v1/adapters/{adapter_id:path}", "404"] == 1
    assert samples[name, "unmatched", "404"] == 1
    assert "secret" not in server.client.get("/metrics").text


def test_counts_tokens_and_observes_their_times(server):
    server.chat(n=2)
    samples = samples_of(server)
    assert samples["manylora_prompt_tokens_total",] == len("[user]hi[assistant]")
    assert samples["manylora_completion_tokens_total",] == 10
    assert samples["manylora_time_to_first_token_seconds_count",] == 2
    assert samples["manylora_inter_token_seconds_count",] == 8


def test_shows_the_engines_report(server):
    assert samples_of(server)["manylora_engine_up",] == 0
    server.engine.load = Load(
        num_running=3,
        num_waiting=5,
        num_free_pages=60,
        num_kv_pages=30,
        num_adapter_pages=10,
        num_steps=7,
        num_preemptions=1,
        num_adapter_loads=4,
        num_adapter_evictions=2,
        num_prompt_tokens=100,
        num_generated_tokens=50,
        num_host_loads=6,
        num_cancelled_loads=8,
        num_cached_pages=20,
        num_cached_tokens=64,
        adapters=(
            ResidentAdapter(digest="a", state="resident", num_pages=1, num_users=1, num_uses=1),
            ResidentAdapter(digest="b", state="loading", num_pages=1, num_host_pages=1),
            ResidentAdapter(digest="c", state="host", num_host_pages=2),
        ),
    )
    samples = samples_of(server)
    assert samples["manylora_engine_up",] == 1
    assert samples["manylora_requests_running",] == 3
    assert samples["manylora_requests_waiting",] == 5
    assert samples["manylora_pages", "kv"] == 30
    assert samples["manylora_pages", "adapter"] == 10
    assert samples["manylora_pages", "cached"] == 20
    assert samples["manylora_pages", "free"] == 60
    assert samples["manylora_kv_cache_usage_ratio",] == 0.25
    assert samples["manylora_engine_cached_prompt_tokens_total",] == 64
    assert samples["manylora_adapters", "resident"] == 1
    assert samples["manylora_adapters", "loading"] == 1
    assert samples["manylora_adapters", "host"] == 1
    assert samples["manylora_host_pages",] == 3
    assert samples["manylora_adapter_host_loads_total",] == 6
    assert samples["manylora_adapter_cancelled_loads_total",] == 8
    assert samples["manylora_adapter_loads_total",] == 4
    assert samples["manylora_adapter_evictions_total",] == 2
    assert samples["manylora_preemptions_total",] == 1


def test_the_page_loads_nothing_from_elsewhere(server):
    response = server.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "innerHTML" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
