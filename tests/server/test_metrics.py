"""The names, labels and edges that dashboards rely on, and that the numbers are right."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.protocol import EngineStats
from server.metrics import Metrics
from tests.server.front import door, says
from tests.server.text_models import ids_of

ITL = [
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
]  # fmt: skip
EDGES = {
    "vllm:time_to_first_token_seconds": [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
        40, 80, 160, 640, 2560,
    ],
    "vllm:inter_token_latency_seconds": ITL,
    "vllm:request_time_per_output_token_seconds": ITL,
    "vllm:e2e_request_latency_seconds": [
        0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
        120, 240, 480, 960, 1920, 7680,
    ],
}  # fmt: skip
COUNTERS = {
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "quire:prefix_cache_recovered_total",
    "quire:kv_blocks_evicted_total",
}
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "quire:kv_blocks",
}


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(text: str, name: str, **labels: str) -> float:
    matching = [v for found, v in samples(text)[name] if labels.items() <= found.items()]
    assert len(matching) == 1
    return matching[0]


def test_names_labels_and_edges() -> None:
    front = door(says("hello"))
    front.chat(model="quiet-2", user="somebody", stop="x")
    response = front.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.text)
    histograms = {f"{name}_{end}" for name in EDGES for end in ("bucket", "count", "sum")}
    assert set(found) == histograms | COUNTERS | GAUGES
    for name, edges in EDGES.items():
        assert [float(labels["le"]) for labels, _ in found[f"{name}_bucket"]] == [
            *edges,
            float("inf"),
        ]
    for name, rows in found.items():
        for labels, _ in rows:
            assert labels["model_name"] == "quiet"  # the first name, whatever the client wrote
            assert set(labels) <= {"model_name", "le", "finished_reason", "state"}, name


def test_gauges_come_from_the_engine_at_every_scrape() -> None:
    engine = says("x")
    front = door(engine)
    engine.snapshot = EngineStats(
        running=3,
        waiting=2,
        blocks_total=8,
        blocks_used=2,
        blocks_cached=5,
        blocks_evicted=9,
        preemptions=5,
        prefix_queries=40,
        prefix_hits=32,
        prefix_recovered=16,
    )
    text = front.get("/metrics").text
    assert value(text, "vllm:num_requests_running") == 3
    assert value(text, "vllm:num_requests_waiting") == 2
    assert value(text, "vllm:kv_cache_usage_perc") == 0.25
    assert value(text, "vllm:num_preemptions_total") == 5
    assert value(text, "vllm:prefix_cache_queries_total") == 40
    assert value(text, "vllm:prefix_cache_hits_total") == 32
    assert value(text, "quire:prefix_cache_recovered_total") == 16
    assert value(text, "quire:kv_blocks_evicted_total") == 9
    for state, blocks in (("active", 2), ("cached", 5), ("free", 1)):
        assert value(text, "quire:kv_blocks", state=state) == blocks
    engine.snapshot = EngineStats()
    assert value(front.get("/metrics").text, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_counts(stream: bool) -> None:
    engine = says("hello world")
    front = door(engine)
    front.chat(n=2, stream=stream)
    front.chat(max_tokens=1, stream=stream)
    front.chat(stop="hello", stream=stream)
    text = front.get("/metrics").text
    tokens = len(ids_of("hello world")) + 1
    prompts = sum(len(request.prompt_ids) for request in engine.submitted)
    assert value(text, "vllm:prompt_tokens_total") == prompts
    made = 2 * tokens + 1 + len(ids_of("hello"))
    assert value(text, "vllm:generation_tokens_total") == made
    assert value(text, "vllm:time_to_first_token_seconds_count") == 4
    assert value(text, "vllm:inter_token_latency_seconds_count") == made - 4
    assert value(text, "vllm:e2e_request_latency_seconds_count") == 4
    several = 2 + (len(ids_of("hello")) > 1)  # answers of more than one token
    assert value(text, "vllm:request_time_per_output_token_seconds_count") == several
    for reason, count in (("stop", 3), ("length", 1), ("abort", 0), ("error", 0)):
        assert value(text, "vllm:request_success_total", finished_reason=reason) == count


def test_failures_and_refusals() -> None:
    failing = door(says("hello", fail_after=1))
    failing.chat(n=2)
    text = failing.get("/metrics").text
    assert value(text, "vllm:request_success_total", finished_reason="error") == 2
    assert value(text, "vllm:e2e_request_latency_seconds_count") == 0
    failing.chat(temperature=9)
    assert failing.get("/metrics").text == text


def test_times_of_an_answer() -> None:
    metrics = Metrics(EngineStats, "m")

    def text() -> str:
        return metrics.scrape().decode()

    clock = metrics.answer(arrival=10.0)
    clock.tokens(1, 12.0)
    clock.tokens(0, 12.5)
    clock.tokens(3, 15.0)  # one step of three tokens: a second each
    clock.tokens(1, 15.5)
    clock.finish("length", 15.6)
    expected: dict[str, Any] = {
        "vllm:time_to_first_token_seconds_sum": 2.0,
        "vllm:inter_token_latency_seconds_sum": 3.5,
        "vllm:inter_token_latency_seconds_count": 4,
        "vllm:request_time_per_output_token_seconds_sum": 3.5 / 4,
        "vllm:e2e_request_latency_seconds_sum": 5.6,
    }
    for name, wanted in expected.items():
        assert value(text(), name) == pytest.approx(wanted)


def test_first_token_counts_from_the_arrival_at_the_edge() -> None:
    """Reading the body, the template and the tokenizer are part of it."""
    front = door(says("hello", admit_seconds=0.06))
    front.chat()
    assert value(front.get("/metrics").text, "vllm:time_to_first_token_seconds_sum") >= 0.06
