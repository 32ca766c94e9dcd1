"""The names, labels and edges that dashboards rely on, and that the numbers are right."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.protocol import EngineStats, Progress, Receipt, Refusal, StepOutput, StepReport
from engine.protocol import TokenDelta as Delta
from scheduler.request import InvalidRequest, Request, SamplingParams
from server.errors import ApiError, unsupported
from server.keys import KeyRing
from server.metrics import Metrics, Slo, scrape
from server.metrics.exposition import CONTENT_TYPE, Registry
from server.metrics.failures import failure, rejection
from server.metrics.loop_lag import LoopLag
from server.metrics.process import ProcessMetrics
from server.metrics.scrape import Scrape
from server.startup_times import StartupTimes
from tests.server.fake_engine import INFO, FakeEngine
from tests.server.front import CHAT, Door, app_over, door, says
from tests.server.text_models import ids_of

CONTRACT = Path(__file__).with_name("metrics_contract.txt")
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scrape sees the text of one before it."""
    monkeypatch.setattr(scrape, "MAX_AGE", 0.0)


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


def described(text: str) -> list[str]:
    """A line per metric: type, name, labels, and the edges of a histogram."""
    lines = []
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        sample = f"{name}_bucket" if kind == "histogram" else name
        series = re.findall(rf"^{sample}(?:{{(.*)}})? \S+$", text, re.MULTILINE)
        assert series, f"{name} has no sample"
        labels = [dict(re.findall(r'(\w+)="([^"]*)"', inside)) for inside in series]
        edges = list(dict.fromkeys(found.pop("le") for found in labels if "le" in found))
        assert len({frozenset(found) for found in labels}) == 1, f"{name}: labels differ"
        lines.append(" ".join([kind, name, ",".join(sorted(labels[0])) or "-", *edges]))
    return lines


def test_the_contract() -> None:
    """Renaming a metric or losing an edge breaks somebody's board: the list is changed by hand."""
    front = door(says("hello"), startup={"weights": 1.0})
    front.chat(model="quiet-2", user="somebody", stop="x")
    text = front.get("/metrics").text
    text = front.get("/metrics").text  # with the first one's HTTP metrics
    assert described(text) == CONTRACT.read_text().splitlines()


def test_the_documentation_names_every_metric() -> None:
    names = [line.split()[1] for line in CONTRACT.read_text().splitlines()]
    missing = [name for name in names if f"`{name}`" not in DOCS.read_text()]
    assert not missing


def test_no_label_takes_a_string_of_a_client() -> None:
    front = door(says("hello"))
    odd = "odd-string"
    front.chat(model="quiet-2", user=odd, stop=odd, cache_salt=odd)
    front.chat(model=odd)
    front.get(f"/{odd}")
    front.get(f"/v1/models/{odd}", headers={"x-request-id": odd})
    front.call("ODD-STRING", "/v1/models")
    text = front.get("/metrics").text
    assert odd not in text.lower()
    for labels, _ in samples(text)["vllm:request_success_total"]:
        assert labels["model_name"] == "quiet"  # the first name, whatever the client wrote


def test_gauges_come_from_the_engine() -> None:
    engine = says("x")
    front = door(engine)
    engine.snapshot = EngineStats(
        running=3,
        waiting=2,
        waiting_deferred=1,
        blocks_total=8,
        blocks_used=2,
        blocks_cached=5,
        blocks_evicted=9,
        preemptions=5,
        prefix_queries=40,
        prefix_hits=32,
        prefix_recovered=16,
        preemptions_swap=2,
        preemptions_recompute=3,
        host_blocks_total=7,
        host_blocks_used=3,
        host_hits=48,
        disk_blocks=11,
        disk_bytes=4096,
        disk_hits=64,
        disk_errors=6,
        fragmentation=0.125,
        jit_compiles=4,
    )
    text = front.get("/metrics").text
    assert value(text, "vllm:num_requests_running") == 3
    assert value(text, "vllm:num_requests_waiting") == 2
    for reason in ("capacity", "deferred"):
        assert value(text, "vllm:num_requests_waiting_by_reason", reason=reason) == 1
    assert value(text, "vllm:kv_cache_usage_perc") == 0.25
    assert value(text, "vllm:num_preemptions_total") == 5
    assert value(text, "vllm:prefix_cache_queries_total") == 40
    assert value(text, "vllm:prefix_cache_hits_total") == 32
    assert value(text, "quire:prefix_cache_recovered_total") == 16
    assert value(text, "quire:kv_blocks_evicted_total") == 9
    assert value(text, "quire:kv_fragmentation_ratio") == 0.125
    assert value(text, "quire:jit_compiles_after_ready_total") == 4
    for state, blocks in (("active", 2), ("cached", 5), ("free", 1)):
        assert value(text, "quire:kv_blocks", state=state) == blocks
    assert value(text, "quire:preemptions_total", mode="swap") == 2
    assert value(text, "quire:preemptions_total", mode="recompute") == 3
    assert value(text, "quire:kv_host_hits_total") == 48
    assert value(text, "quire:kv_disk_blocks") == 11
    assert value(text, "quire:kv_disk_bytes") == 4096
    assert value(text, "quire:kv_disk_hits_total") == 64
    assert value(text, "quire:kv_disk_errors_total") == 6
    for state, blocks in (("used", 3), ("free", 4)):
        assert value(text, "quire:kv_host_blocks", state=state) == blocks
    size = {"block_size": "16", "num_gpu_blocks": "64", "enable_prefix_caching": "True"}
    assert value(text, "vllm:cache_config_info", **size) == 1
    engine.snapshot = EngineStats()
    assert value(front.get("/metrics").text, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_counts(stream: bool) -> None:
    engine = says("hello world", cached_tokens=2)
    front = door(engine)
    front.chat(n=2, stream=stream)
    front.chat(max_tokens=1, stream=stream)
    front.chat(stop="hello", stream=stream)
    text = front.get("/metrics").text
    tokens = len(ids_of("hello world")) + 1
    prompts = sum(len(request.prompt_ids) for request in engine.submitted)
    assert value(text, "vllm:prompt_tokens_total") == prompts
    assert value(text, "vllm:prompt_tokens_cached_total") == 6
    made = 2 * tokens + 1 + len(ids_of("hello"))
    assert value(text, "vllm:generation_tokens_total") == made
    assert value(text, "vllm:time_to_first_token_seconds_count") == 4
    assert value(text, "vllm:inter_token_latency_seconds_count") == made - 4
    several = 2 + (len(ids_of("hello")) > 1)  # answers of more than one token
    assert value(text, "vllm:request_time_per_output_token_seconds_count") == several
    for reason, count in (("stop", 3), ("length", 1), ("abort", 0), ("error", 0)):
        assert value(text, "vllm:request_success_total", finished_reason=reason) == count
    for name in ANSWER_HISTOGRAMS:
        assert value(text, f"{name}_count") == 4, name
    assert value(text, "vllm:request_params_n_count") == 3
    assert value(text, "vllm:request_params_n_sum") == 4
    assert value(text, "vllm:request_generation_tokens_sum") == made
    answers = {"handler": "/v1/chat/completions", "method": "POST"}
    assert value(text, "http_requests_total", status="2xx", **answers) == 3
    assert value(text, "http_request_duration_seconds_count", **answers) == 3


ANSWER_HISTOGRAMS = [
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_num_preemptions",
]


class Meter:
    """Metrics, and requests whose times a test makes up."""

    def __init__(self) -> None:
        self.metrics = Metrics(EngineStats, INFO, "m", slo=Slo(ttft=2.0, tpot=1.0))

    def request(self, n: int = 1) -> Request:
        sampling = SamplingParams(max_tokens=7, seed=0)
        return Request(id="r", prompt_ids=(1, 2, 3), sampling=sampling, n=n)

    def value(self, name: str, **labels: str) -> float:
        return value(self.metrics.render().decode(), name, **labels)


def test_times_of_an_answer() -> None:
    meter = Meter()
    [clock] = meter.metrics.answers(meter.request(), arrival=10.0)
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
        "vllm:request_prompt_tokens_sum": 3,
        "vllm:request_generation_tokens_sum": 5,
        "vllm:request_params_max_tokens_sum": 7,
    }
    for name, wanted in expected.items():
        assert meter.value(name) == pytest.approx(wanted), name


def test_an_aborted_answer_is_observed_and_one_token_has_no_time_per_token() -> None:
    meter = Meter()
    queued, short = meter.metrics.answers(meter.request(n=2), arrival=10.0)
    queued.finish("abort", 14.0)
    short.tokens(1, 11.0)
    short.finish("stop", 11.0)
    assert meter.value("vllm:e2e_request_latency_seconds_sum") == 5.0
    assert meter.value("vllm:time_to_first_token_seconds_count") == 1
    assert meter.value("vllm:inter_token_latency_seconds_count") == 0
    assert meter.value("vllm:request_time_per_output_token_seconds_count") == 0
    assert meter.value("vllm:request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize(
    ("ttft", "tpot", "within"),
    [
        (2.0, 1.0, "ttft tpot both"),
        (2.1, 0.5, "tpot"),
        (0.5, 1.1, "ttft"),
        (0.5, None, "ttft both"),
    ],
)
def test_slo(ttft: float, tpot: float | None, within: str) -> None:
    meter = Meter()
    [clock] = meter.metrics.answers(meter.request(), arrival=0.0)
    clock.tokens(1, ttft)
    if tpot is not None:
        clock.tokens(2, ttft + 2 * tpot)
    clock.finish("stop", 9.0)
    counted = [
        slo
        for slo in ("ttft", "tpot", "both")
        if meter.value("quire:requests_within_slo_total", slo=slo)
    ]
    assert counted == within.split()


def test_the_engine_tells_of_steps_and_of_where_the_time_went() -> None:
    meter = Meter()
    receipt = Receipt(queue=0.5, prefill=1.0, decode=2.0, preemptions=3)
    step = StepReport(tokens=40, seconds=0.25, scheduler_seconds=0.002, ended=1e9)
    delta = Delta("r", 0, [5], "stop", receipt=receipt)
    meter.metrics.heard(StepOutput(EngineStats(), deltas=[delta], step=step))
    for name, wanted in (
        ("vllm:request_queue_time_seconds_sum", 0.5),
        ("vllm:request_prefill_time_seconds_sum", 1.0),
        ("vllm:request_decode_time_seconds_sum", 2.0),
        ("vllm:request_inference_time_seconds_sum", 3.0),
        ("vllm:request_num_preemptions_sum", 3),
        ("vllm:iteration_tokens_total_sum", 40),
        ("quire:engine_step_seconds_sum", 0.25),
        ("quire:scheduler_seconds_sum", 0.002),
        ("quire:engine_last_step_timestamp_seconds", 1e9),
    ):
        assert meter.value(name) == wanted, name


def test_who_left_before_admission_was_known_counts_once_it_is() -> None:
    meter = Meter()
    for request_id in ("taken", "refused"):
        request = Request(id=request_id, prompt_ids=(1,), sampling=SamplingParams(seed=0))
        meter.metrics.abandoned(request, meter.metrics.answers(request, arrival=0.0))
    output = StepOutput(EngineStats(), admitted=["taken"], refused=[Refusal("refused", "", "", "")])
    meter.metrics.heard(output)
    meter.metrics.heard(output)
    request = meter.request()
    meter.metrics.abandoned(request, meter.metrics.answers(request, arrival=0.0))
    never_admitted = StepOutput(EngineStats(), deltas=[Delta(request.id, 0, [], "abort")])
    meter.metrics.heard(never_admitted)
    meter.metrics.heard(StepOutput(EngineStats(), admitted=[request.id]))
    assert meter.value("vllm:request_success_total", finished_reason="abort") == 1
    assert meter.value("vllm:request_params_n_count") == 1


def test_a_stalled_engine_and_the_start() -> None:
    metrics = Metrics(EngineStats, INFO, "m", startup={"weights": 2.5}, stalled=lambda: True)
    text = metrics.render().decode()
    assert value(text, "quire:engine_stalled") == 1
    assert value(text, "quire:startup_seconds", phase="weights") == 2.5


def test_startup_phases_last_until_the_next_one_begins() -> None:
    clock = iter([10.0, 11.0, 15.0, 15.5])  # it is read when a phase begins
    times = StartupTimes(lambda: next(clock))
    for phase in ("weights", "weights", "kernels"):
        times.take(Progress(phase, 0, 1))
    assert times.ready() == {"process": 1.0, "weights": 4.0, "kernels": 0.5}


def failures(front: Door) -> dict[str, float]:
    rows = samples(front.get("/metrics").text)["quire:request_failure_total"]
    return {labels["reason"]: count for labels, count in rows if count}


@pytest.mark.parametrize("stream", [False, True])
def test_failures_and_refusals(stream: bool) -> None:
    failing = door(says("hello", fail_after=1))
    failing.chat(n=2, stream=stream)
    failing.chat(temperature=9, stream=stream)
    failing.call("POST", "/v1/chat/completions", content=b"{")
    failing.get("/v1/models/unknown")  # asks for no answer
    text = failing.get("/metrics").text
    assert value(text, "vllm:request_success_total", finished_reason="error") == 2
    assert value(text, "vllm:e2e_request_latency_seconds_count") == 2
    assert failures(failing) == {"engine_error": 1, "validation": 2}
    refusing = door(says("x", refuse=InvalidRequest("no room", "prompt", "kv_capacity_exceeded")))
    refusing.complete(stream=stream)
    assert failures(refusing) == {"validation": 1}
    assert value(refusing.get("/metrics").text, "vllm:e2e_request_latency_seconds_count") == 0
    dead = door(says("x", alive=False))
    dead.complete(stream=stream)
    assert failures(dead) == {"engine_error": 1}


@pytest.mark.parametrize(
    ("error", "reason", "turned_away"),
    [
        (unsupported("x", "no"), "validation", None),
        (ApiError(401, "no", code="invalid_api_key"), "validation", None),
        (ApiError(429, "no", code="rate_limit_exceeded"), "overloaded", "rate_limit_exceeded"),
        (ApiError(503, "no", code="queue_full"), "overloaded", "queue_full"),
        (ApiError(503, "no", code="shutting_down"), "overloaded", "unavailable"),
        (ApiError(503, "no", code="engine_dead"), "engine_error", None),
        (ApiError(504, "no", code="deadline_exceeded"), "timeout", None),
        (ApiError(500, "no", code="aborted"), "aborted", None),
        (ApiError(500, "no", code="internal_error"), "engine_error", None),
    ],
)
def test_why_requests_fail(error: ApiError, reason: str, turned_away: str | None) -> None:
    assert (failure(error), rejection(error)) == (reason, turned_away)


def test_handlers_are_templates_of_routes() -> None:
    front = door(says("x"))
    front.get("/v1/models/quiet")
    front.get("/v1/models/other")
    front.get("/nowhere")
    front.get("/v1/chat/completions")
    rows = samples(front.get("/metrics").text)["http_requests_total"]
    assert [(labels["handler"], labels["status"], count) for labels, count in rows] == [
        ("/v1/models/{name:path}", "2xx", 1),
        ("/v1/models/{name:path}", "4xx", 1),
        ("unknown", "4xx", 1),
        ("/v1/chat/completions", "4xx", 1),
    ]


def test_first_token_counts_from_the_arrival_at_the_edge() -> None:
    """Reading the body, the template and the tokenizer are part of it."""
    front = door(says("hello", admit_seconds=0.06))
    front.chat()
    assert value(front.get("/metrics").text, "vllm:time_to_first_token_seconds_sum") >= 0.06


def test_scrapes_share_a_text_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "MAX_AGE", 0.1)
    now, renderings = 0.0, 0

    def render() -> bytes:
        nonlocal renderings
        renderings += 1
        time.sleep(0.01)
        return b"%d" % renderings

    async def ask() -> None:
        nonlocal now
        shared = Scrape(render, clock=lambda: now)
        assert await asyncio.gather(*(shared.text() for _ in range(5))) == [b"1"] * 5
        now = 0.09
        assert await shared.text() == b"1"
        now = 0.1
        assert await shared.text() == b"2"

    asyncio.run(ask())


def test_what_proc_says_is_read_once_a_second() -> None:
    now = 5.0
    process = ProcessMetrics(lambda: now)
    first = process.render()
    assert b"process_cpu_seconds_total" in first
    now = 5.9
    assert process.render() is first
    now = 6.0
    assert process.render() is not first


def test_what_has_no_news_is_not_rendered_again() -> None:
    reads: list[int] = []
    registry = Registry[int]({})
    seconds = registry.histogram("seconds", "Seconds.", [1.0])
    requests = registry.counter("requests_total", "Requests.")
    registry.read("gauge", "running", "Running.", lambda state: reads.append(state) or state)
    first = registry.render(0)
    assert all(line in first for line in (b"seconds_count 0.0", b"requests_total 0.0"))
    assert (registry.render(0), reads) == (first, [0])
    seconds.observe(0.0)  # which leaves the sum as it was
    assert b"seconds_count 1.0" in registry.render(0)
    seconds.observe(2.0)
    requests.inc()
    later = registry.render(3)
    assert all(line in later for line in (b"seconds_sum 2.0", b"requests_total 1.0", b"running 3"))
    registry.counter("requests_total", "Requests.", kind="late")
    assert b'requests_total 1.0\nrequests_total{kind="late"} 0.0\n' in registry.render(3)
    assert reads == [0, 3]


def test_a_quiet_text_is_made_at_once_and_others_on_a_thread() -> None:
    threads: list[int] = []
    quiet = False

    def render() -> bytes:
        threads.append(threading.get_ident())
        return b""

    async def ask() -> None:
        nonlocal quiet
        shared = Scrape(render, lambda: quiet)
        await shared.text()
        quiet = True
        await shared.text()

    asyncio.run(ask())
    assert [thread == threading.get_ident() for thread in threads] == [False, True]


def test_quiet_means_nothing_heard_since_the_last_text() -> None:
    stats = EngineStats()
    metrics = Metrics(lambda: stats, INFO, "m")
    assert not metrics.quiet
    metrics.render()
    assert metrics.quiet
    stats = EngineStats()
    assert not metrics.quiet


def test_a_scrape_enters_no_layer_of_the_application() -> None:
    app = app_over(says("x"), keys=KeyRing([("sk-mine", "")]))
    paths: list[str] = []

    class Layer:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            paths.append(f"{scope['method']} {scope['path']}")
            await self._app(scope, receive, send)

    app.add_middleware(Layer)  # the outermost
    front = Door(app)
    answer = front.get("/metrics", headers={"authorization": "Bearer sk-mine"})
    assert (answer.status_code, paths) == (200, [])
    assert answer.headers["content-length"] == str(len(answer.content))
    assert front.get("/metrics").status_code == 401
    refused = front.call("POST", "/metrics", headers={"authorization": "Bearer sk-mine"})
    assert (refused.status_code, sorted(refused.headers["allow"].split(", "))) == (
        405,
        ["GET", "HEAD"],
    )
    assert paths == ["GET /metrics", "POST /metrics"]


def test_a_scrape_is_a_request_like_others() -> None:
    """It has an id and is counted, though it takes a short cut."""
    front = door(says("x"))
    answer = front.get("/metrics", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["content-type"] == CONTENT_TYPE
    labels = {"handler": "/metrics", "method": "GET", "status": "2xx"}
    assert value(front.get("/metrics").text, "http_requests_total", **labels) == 1


def test_the_event_loop_s_lag_is_seen() -> None:
    metrics = Meter().metrics

    async def hold_up() -> None:
        lag = LoopLag(metrics.event_loop_lag)
        lag.watch()
        lag.watch()
        await asyncio.sleep(0)
        time.sleep(0.25)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(hold_up())
    assert metrics.event_loop_lag.count == 1
    assert metrics.event_loop_lag.total >= 0.1


def test_an_edge_belongs_to_its_bucket() -> None:
    meter = Meter()
    for seconds, times in ((0.1, 2), (0.1001, 1), (1e6, 3)):
        meter.metrics.whole_request.observe(seconds, times)
    name = "vllm:e2e_request_latency_seconds"
    counts = {edge: meter.value(f"{name}_bucket", le=edge) for edge in ("0.05", "0.1", "0.2")}
    assert counts == {"0.05": 0, "0.1": 2, "0.2": 3}
    assert meter.value(f"{name}_bucket", le="+Inf") == meter.value(f"{name}_count") == 6


def test_labels_are_escaped() -> None:
    metrics = Metrics(EngineStats, INFO, 'a "b" \\ c\nd')
    found = samples(metrics.render().decode())["vllm:generation_tokens_total"]
    assert found[0][0]["model_name"] == 'a "b" \\ c\nd'


def test_nothing_of_the_chat_is_in_the_metrics() -> None:
    front = door(FakeEngine(lambda request, index: ids_of("hello")))
    front.chat(messages=CHAT["messages"])
    assert "hello" not in front.get("/metrics").text
