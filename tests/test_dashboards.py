"""A real server under load: its counters balance, and a real Prometheus finds data for every query
of the board and of the alerts."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.board import Query, panels
from tests.test_end_to_end import ROOT, Server

RULES = ROOT / "configs" / "prometheus" / "rules.yml"
COMPARISON = re.compile(r"^(.*) [<>]=? [\d.]+$", re.DOTALL)

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Prometheus: apt-get install prometheus",
)
ANSWER_HISTOGRAMS = [
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
    "vllm:request_num_preemptions",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Small enough to preempt."""
    flags = ["--cpu-threads", "1", "--max-num-seqs", "8", "--num-gpu-blocks-override", "48"]
    running = Server("--dtype", "float32", "--max-model-len", "512", *flags)
    yield running
    assert running.stop() == 0, "".join(running.lines)


class Load:
    """Requests for one answer each: good ones, bad ones, and some of clients that hang up."""

    def __init__(self, url: str, seed: int) -> None:
        self._port = int(url.rpartition(":")[2])
        self._url = f"{url}/v1/chat/completions"
        self._pick = random.Random(seed)
        self.sent = 0

    async def run(self, count: int) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            kinds = ["whole", "stream", "stop", "invalid", "hang up", "hang up at once"]
            await asyncio.gather(*(self._one(client, kinds[i % len(kinds)]) for i in range(count)))

    async def _one(self, client: httpx.AsyncClient, kind: str) -> None:
        self.sent += 1
        question = "What is a block table? " * self._pick.randint(1, 8)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self._pick.randint(1, 60),
            "ignore_eos": True,
            "stream": kind == "stream" or self._pick.random() < 0.5,
        }
        if kind == "stop":
            body["stop"] = [" ", "e"]
        if kind == "invalid":
            body["temperature"] = 9
        if kind.startswith("hang up"):
            seconds = 0.0 if kind == "hang up at once" else self._pick.uniform(0.01, 0.5)
            return await self._hang_up(body, seconds)
        answer = await client.post(self._url, json=body)
        assert answer.status_code == (400 if kind == "invalid" else 200), answer.text

    async def _hang_up(self, body: dict[str, Any], seconds: float) -> None:
        content = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        await asyncio.sleep(seconds)
        writer.close()


def wait_until_idle(server: Server, requests: int) -> None:
    """Until all of `requests` were counted and nothing runs."""
    deadline = time.monotonic() + 60
    done = {"handler": "/v1/chat/completions"}
    while time.monotonic() < deadline:
        time.sleep(0.15)  # a scrape is good for 0.1 s
        busy = sum(server.metric(f"vllm:num_requests_{what}") for what in ("running", "waiting"))
        if not busy and value(server, "http_requests_total", **done) == requests:
            return
    raise AssertionError("the server is not idle")


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of the series with these labels."""
    text = httpx.get(f"{server.url}/metrics").text
    rows = re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    assert rows, f"no {name}"
    wanted = [f'{label}="{text}"' for label, text in labels.items()]
    return sum(float(number) for inside, number in rows if all(w in inside for w in wanted))


def test_counters_balance_after_a_load(server: Server) -> None:
    load = Load(server.url, seed=1)
    asyncio.run(load.run(90))
    wait_until_idle(server, load.sent)
    good = sum(
        value(server, "vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length")
    )
    failures = value(server, "quire:request_failure_total")
    assert good + failures == load.sent
    assert value(server, "quire:request_failure_total", reason="validation") == 15
    assert value(server, "quire:request_failure_total", reason="client_disconnect") > 0
    ended = value(server, "vllm:request_success_total")
    counts = {name: value(server, f"{name}_count") for name in ANSWER_HISTOGRAMS}
    assert counts == dict.fromkeys(ANSWER_HISTOGRAMS, ended)
    begun = value(server, "vllm:time_to_first_token_seconds_count")
    tokens = value(server, "vllm:generation_tokens_total")
    assert value(server, "vllm:inter_token_latency_seconds_count") == tokens - begun
    assert value(server, "vllm:request_generation_tokens_sum") == tokens
    assert value(server, "vllm:kv_cache_usage_perc") == 0
    assert value(server, "quire:kv_fragmentation_ratio") == 0
    assert value(server, "quire:kv_blocks") == 48
    assert value(server, "quire:engine_stalled") == 0


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the server, which is under load meanwhile."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((ROOT / "configs" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [
        {"targets": [server.url.removeprefix("http://")]}
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command)
    try:
        wait_for_samples(f"http://{address}", 2)
        asyncio.run(Load(server.url, seed=2).run(24))
        wait_for_samples(f"http://{address}", 4)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def wait_for_samples(url: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            httpx.get(f"{url}/-/ready").raise_for_status()  # it listens before: 503
        except httpx.HTTPError:
            continue  # it starts
        seen = ask(url, "count_over_time(vllm:num_requests_running[1h])")
        if seen and seen[0] >= count:
            return
    raise AssertionError("Prometheus does not scrape the server")


def ask(url: str, expression: str) -> list[float]:
    """The values that are numbers."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression})
    assert answer.status_code < 500, answer.text
    body = answer.json()
    assert body["status"] == "success", f"{expression}: {body}"
    values = [float(item["value"][1]) for item in body["data"]["result"]]
    return [number for number in values if not math.isnan(number)]


@needs_prometheus
def test_every_query_of_the_board_finds_data(prometheus: str) -> None:
    empty = [
        f"{panel.title}: {query.expression}"
        for panel in panels()
        for query in panel.queries
        if not ask(prometheus, query.filled("1m"))
    ]
    assert not empty


@needs_prometheus
def test_every_alert_looks_at_data_and_none_is_raised(prometheus: str) -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    for rule in rules:
        compared = COMPARISON.match(rule["expr"])
        assert compared, f"{rule['alert']} compares nothing"
        assert ask(prometheus, compared[1]), rule["alert"]
    loaded = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert [(rule["name"], rule["health"]) for rule in loaded] == [
        (rule["alert"], "ok") for rule in rules
    ]
    assert not ask(prometheus, 'ALERTS{alertstate="firing"}')


@needs_prometheus
@pytest.mark.parametrize(
    "command",
    [["test", "rules", "rules_test.yml"], ["check", "config", "prometheus.yml"]],
    ids=["rules", "config"],
)
def test_promtool(command: list[str]) -> None:
    folder = ROOT / "configs" / "prometheus"
    done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_board_asks_for_metrics_that_there_are() -> None:
    """Without a Prometheus, at least the names are right."""
    contract = Path(__file__).parent / "server" / "metrics_contract.txt"
    kinds = {line.split()[1]: line.split()[0] for line in contract.read_text().splitlines()}
    expressions = [query.expression for panel in panels() for query in panel.queries]
    expressions += [r["expr"] for r in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
    asked = {
        name
        for expression in expressions
        for name in re.findall(r"(?:vllm|quire):\w+|(?:http|process)_\w+", expression)
    }
    assert len(asked) > 20
    for name in asked:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in kinds or kinds.get(base) == "histogram", name


def test_queries_are_filled_as_grafana_does() -> None:
    query = Query('rate(x{model_name=~"$model_name"}[$__rate_interval])', "{{reason}}!")
    assert query.filled("5s", "m") == 'rate(x{model_name=~"m"}[5s])'
    assert query.name({"reason": "stop"}) == "stop!"
