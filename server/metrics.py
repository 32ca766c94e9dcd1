"""What `/metrics` says, in the `vllm:` dialect that dashboards and autoscalers already read.

Times are taken in this process: they are what a client sees, less the network. No label takes a
client's string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.protocol import EngineStats

# Seconds. The edges of vLLM, and finer ones below them for small models.
FIRST_TOKEN_EDGES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN_EDGES = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_EDGES = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
    120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

FINISHED_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """The counters and histograms of one server, in a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        """`stats` gives the engine's newest snapshot; it is asked at every scrape."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._registry.register(_EngineGauges(stats, model_name))

        def histogram(name: str, text: str, edges: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, text, ["model_name"], buckets=edges, registry=self._registry)
            return metric.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self._registry).labels(model_name)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request to the first token of an answer.",
            FIRST_TOKEN_EDGES,
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds",
            "From a token to the next one, once per token.",
            PER_TOKEN_EDGES,
        )
        self.per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first, once per answer of two tokens or more.",
            PER_TOKEN_EDGES,
        )
        self.whole_request = histogram(
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request to the end of an answer.",
            REQUEST_EDGES,
        )
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts computed.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        finished = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._finished = {
            reason: finished.labels(model_name, reason) for reason in FINISHED_REASONS
        }

    def scrape(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def answer(self, arrival: float) -> AnswerClock:
        """The clock of one answer to a request that arrived at `arrival` (monotonic seconds)."""
        return AnswerClock(self, arrival)

    def finished(self, reason: str) -> None:
        """Counts an answer that ended."""
        self._finished[reason].inc()


class AnswerClock:
    """Observes the times of one answer as its tokens come in."""

    __slots__ = ("_arrival", "_count", "_first", "_last", "_metrics")

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics, self._arrival = metrics, arrival
        self._count = 0
        self._first = self._last = 0.0

    @property
    def ttft(self) -> float | None:
        """Seconds from the arrival to the first token; None without one."""
        return self._first - self._arrival if self._count else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two."""
        return (self._last - self._first) / (self._count - 1) if self._count > 1 else None

    def tokens(self, count: int, now: float) -> None:
        """`count` more tokens have come in at `now`, monotonic seconds. Tokens of one step share
        the time since the last one."""
        if not count:
            return
        metrics = self._metrics
        metrics.generation_tokens.inc(count)
        if not self._count:
            metrics.first_token.observe(now - self._arrival)
            self._first = self._last = now
            gaps = count - 1
        else:
            gaps = count
        for _ in range(gaps):
            metrics.between_tokens.observe((now - self._last) / gaps)
        self._last = now
        self._count += count

    def finish(self, reason: str, now: float) -> None:
        """The answer has ended. Times of aborted and failed ones would only blur the others."""
        self._metrics.finished(reason)
        if reason not in ("stop", "length"):
            return
        self._metrics.whole_request.observe(now - self._arrival)
        if self._count > 1:
            mean = (self._last - self._first) / (self._count - 1)
            self._metrics.per_output_token.observe(mean)


class _EngineGauges(Collector):
    """Asks the engine's snapshot when scraped, instead of copying it after every step."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self._stats, self._model_name = stats, model_name

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        gauges = (
            ("vllm:num_requests_running", "Sequences that the engine computes.", stats.running),
            ("vllm:num_requests_waiting", "Sequences that wait for room.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", used),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        kv_blocks = GaugeMetricFamily(
            "quire:kv_blocks", "KV blocks by what they are.", labels=["model_name", "state"]
        )
        free = stats.blocks_total - stats.blocks_used - stats.blocks_cached
        for state, blocks in (
            ("active", stats.blocks_used),
            ("cached", stats.blocks_cached),
            ("free", free),
        ):
            kv_blocks.add_metric([self._model_name, state], blocks)
        yield kv_blocks
        counters = (
            ("vllm:num_preemptions", "Sequences put back to make room.", stats.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found cached.", stats.prefix_hits),
            (
                "quire:prefix_cache_recovered",
                "Tokens found cached again after a preemption.",
                stats.prefix_recovered,
            ),
            ("quire:kv_blocks_evicted", "Cached blocks given up.", stats.blocks_evicted),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
