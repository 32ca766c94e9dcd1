"""The whole path, as a user has it: `quire serve` in its own process, the openai SDK outside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.models import checkpoints
from tests.server.strict import strict_client

ROOT = Path(__file__).parent.parent
MODEL = "quire-embedded"
QUESTION = [{"role": "user", "content": "What is a block table?"}]
LONG = [{"role": "user", "content": "Explain paging in detail."}]


class Server:
    """`quire serve` with the embedded model on a free port."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")},
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(120) or self.process.poll() is not None:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no {name} in the metrics"
        return sum(map(float, values))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--dtype", "float32", "--cpu-threads", "1", "--max-num-seqs", "32")
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return strict_client(server.url)


def streamed(client: openai.OpenAI, **options: object) -> tuple[list[str], list[str], object]:
    """Texts, finish reasons and usage of a streamed chat."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in client.chat.completions.create(
        model=MODEL, stream=True, stream_options={"include_usage": True}, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return [texts[i] for i in sorted(texts)], [reasons[i] for i in sorted(reasons)], usage


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def test_structured_answers_validate(client: openai.OpenAI):
    """Several of them, streamed and whole."""
    options = {
        "messages": QUESTION,
        "response_format": PERSON_FORMAT,
        "temperature": 1.5,
        "seed": 3,
        "n": 4,
        "max_tokens": 300,
    }
    texts, reasons, _ = streamed(client, **options)
    assert reasons == ["stop"] * 4
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    whole = client.chat.completions.create(model=MODEL, **options)
    assert [choice.message.content for choice in whole.choices] == texts


def test_demanded_calls_parse(client: openai.OpenAI):
    """Whatever a model that never saw a tool makes of it."""
    tool = {"type": "function", "function": {"name": "person", "parameters": PERSON}}
    named = {"type": "function", "function": {"name": "person"}}
    for choice in ("required", named):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[tool],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=1.5,
            seed=4,
            max_tokens=300,
        ).choices[0]
        assert answer.finish_reason == "tool_calls"
        [call] = answer.message.tool_calls
        assert call.function.name == "person"
        jsonschema.validate(json.loads(call.function.arguments), PERSON)


def test_responses_hold_what_is_demanded(client: openai.OpenAI):
    """A streamed text, a structured one and a call."""
    options = {"model": MODEL, "input": "What is a block table?", "max_output_tokens": 300}
    events = list(client.responses.create(**options, temperature=0, stream=True))
    assert events[-1].type == "response.completed"
    assert "block" in events[-1].response.output_text
    format = {"type": "json_schema", "name": "person", "schema": PERSON}
    answer = client.responses.create(**options, text={"format": format}, extra_body={"seed": 3})
    jsonschema.validate(json.loads(answer.output_text), PERSON)
    tool = {"type": "function", "name": "person", "parameters": PERSON, "strict": True}
    [call] = client.responses.create(
        **options,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body={"seed": 4},
    ).output
    assert (call.type, call.name) == ("function_call", "person")
    jsonschema.validate(json.loads(call.arguments), PERSON)


def test_hostile_grammars_are_refused_and_disturb_nobody(server: Server, client: openai.OpenAI):
    deep = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(20_000)}
    hostile = [
        {"json": {"$ref": "#/$defs/d0", "$defs": {**deep, "d20000": {}}}},
        {"regex": "(ab|c)*d?" * 30_000},
        {"regex": "(a"},
        {"grammar": "start: nothing"},
    ]
    greedy = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    alone = client.chat.completions.create(**greedy).choices[0].message.content

    def refused(outputs: dict) -> str:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                **greedy, stream=True, extra_body={"structured_outputs": outputs}
            )
        return caught.value.body["param"]

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(refused, outputs) for outputs in hostile]
        others = [pool.submit(client.chat.completions.create, **greedy) for _ in range(3)]
        assert [other.result().choices[0].message.content for other in others] == [alone] * 3
        fields = [f"structured_outputs.{next(iter(outputs))}" for outputs in hostile]
        assert [answer.result() for answer in answers] == fields
    verified = httpx.get(f"{server.url}/debug/kv/verify").json()
    assert verified["ok"], verified


def test_the_sdk_chats(client: openai.OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "block" in choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"messages": QUESTION, "temperature": 0},
        {"messages": LONG, "temperature": 0, "max_tokens": 30},
        {"messages": LONG, "temperature": 1.3, "seed": 5, "n": 3, "max_tokens": 40},
        {"messages": LONG, "temperature": 0, "stop": [" a", "block"]},
    ],
    ids=["plain", "cut", "n", "stop"],
)
def test_streamed_and_whole_answers_are_equal(client: openai.OpenAI, options: dict[str, object]):
    whole = client.chat.completions.create(model=MODEL, **options)
    texts, reasons, usage = streamed(client, **options)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.total_tokens == whole.usage.total_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_prompt_is_found_again_unless_the_salt_differs(client: openai.OpenAI):
    messages = [{"role": "user", "content": "Copy: " + "paged blocks " * 20}]
    found = []
    for salt in ("one", "one", "two"):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=1, extra_body={"cache_salt": salt}
        )
        found.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert found[0] == found[2] == 0
    assert 0 < found[1] < answer.usage.prompt_tokens


def test_completions_take_texts_and_ids(client: openai.OpenAI):
    prompts = ["One block", "Two blocks"]
    options = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    both = client.completions.create(prompt=prompts, **options)
    each = [client.completions.create(prompt=p, **options).choices[0].text for p in prompts]
    assert [choice.text for choice in both.choices] == each
    ids = client.completions.create(prompt=[5, 6, 7], **options)
    assert ids.usage.prompt_tokens == 3


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI):
    options = {"temperature": 0.8, "max_tokens": 24}
    alone = [streamed(client, messages=QUESTION, seed=seed, **options)[0] for seed in range(3)]
    with ThreadPoolExecutor(16) as pool:
        crowd = list(
            pool.map(
                lambda i: streamed(client, messages=QUESTION, seed=i % 3, **options)[0], range(24)
            )
        )
    assert crowd == [alone[i % 3] for i in range(24)]


async def test_clients_that_hang_up_leave_no_block_in_use(server: Server):
    rng = random.Random(3)

    async def hang_up(http: httpx.AsyncClient, number: int) -> None:
        body = {
            "messages": LONG,
            "max_tokens": 1500,
            "stream": number % 4 != 0,
            "n": 1 + number % 2,
            "ignore_eos": True,
        }
        with pytest.raises((TimeoutError, httpx.HTTPError)):
            async with asyncio.timeout(rng.uniform(0.01, 2.0)):
                url = f"{server.url}/v1/chat/completions"
                async with http.stream("POST", url, json=body, timeout=60) as response:
                    async for _ in response.aiter_bytes():
                        pass

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(limits=limits) as http:
        await asyncio.gather(*(hang_up(http, number) for number in range(32)))
    deadline = time.monotonic() + 20
    while server.metric("vllm:kv_cache_usage_perc") or server.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "blocks are still in use"
        await asyncio.sleep(0.05)
    assert server.metric("vllm:num_requests_waiting") == 0
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": QUESTION, "temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"messages": QUESTION, "temperature": 3}, 400, "temperature", "invalid_value"),
        ({"messages": QUESTION, "model": "other"}, 404, "model", "model_not_found"),
        (
            {"messages": QUESTION, "functions": [{"name": "f"}]},
            400,
            "functions",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content.0.type",
            "invalid_value",
        ),
    ],
)
def test_bad_input_is_told_what_is_wrong(server: Server, body, status, param, code):
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.post(f"{server.url}/v1/chat/completions", **content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)


def test_token_ids_outside_the_vocabulary_are_refused(server: Server):
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": [10**9]})
    assert answer.status_code == 400
    assert "1000000000" in answer.json()["error"]["message"]


def test_metrics_count_what_happened(server: Server, client: openai.OpenAI):
    names = {
        "ttft": "vllm:time_to_first_token_seconds_count",
        "tpot": "vllm:request_time_per_output_token_seconds_count",
        "tokens": "vllm:generation_tokens_total",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    after = {key: server.metric(name) for key, name in names.items()}
    assert after["ttft"] == before["ttft"] + 1
    assert after["tpot"] == before["tpot"] + 1
    assert after["tokens"] == before["tokens"] + answer.usage.completion_tokens


def test_what_can_never_fit_the_pool_is_refused():
    """The context may be longer than the pool where the operator says so."""
    small = Server("--num-gpu-blocks-override", "8", "--max-model-len", "1024")
    try:
        body = {"prompt": [5] * 100, "max_tokens": 100}
        answer = httpx.post(f"{small.url}/v1/completions", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "kv_capacity_exceeded")
        assert "13 KV blocks" in error["message"]
        assert "the pool has 8" in error["message"]
        body["max_tokens"] = 5
        assert httpx.post(f"{small.url}/v1/completions", json=body).status_code == 200
    finally:
        assert small.stop() == 0


def test_the_server_ends_when_its_engine_is_killed():
    server = Server("--cpu-threads", "1")
    [engine] = engine_processes(server.process.pid)
    body = {"messages": LONG, "stream": True, "ignore_eos": True, "max_tokens": 1500}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        events = response.iter_lines()
        next(events)
        os.kill(engine, signal.SIGKILL)
        rest = list(events)
    assert '"error"' in rest[-4]
    assert rest[-2] == "data: [DONE]"
    assert server.process.wait(10) == 1


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments, "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_truncated_checkpoint_is_one_line_and_exit_code_2(tmp_path: Path):
    path = checkpoints.make("llama", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = command("serve", str(path), "--log-level", "warning")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("quire: ") and "model.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_check_tells_what_would_run():
    done = command("check", "--num-gpu-blocks-override", "20", "--log-format", "text")
    assert done.returncode == 0, done.stderr
    assert "20 blocks x 16 = 320 tokens" in done.stdout
    assert "less than the context of 2048" in done.stderr


def engine_processes(parent: int) -> list[int]:
    """Children of the server that run the engine (not the resource tracker of multiprocessing)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            command = (status.parent / "cmdline").read_bytes()
            if int(fields[1]) == parent and b"spawn_main" in command:
                found.append(int(status.parent.name))
    return found


class Verdict(BaseModel):
    """What a structured answer is parsed into."""

    kind: Literal["block", "table"]
    sure: bool


def test_the_helpers_of_the_sdk(client: openai.OpenAI):
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(pieces) == final.message.content and final.finish_reason == "stop"

    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, temperature=0, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and "server-timing" in raw.headers
    assert raw.parse().choices[0].message.content == final.message.content

    parsed = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Verdict)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)


async def test_the_async_sdk(server: Server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        options = {"model": MODEL, "messages": QUESTION, "temperature": 0}
        whole = await client.chat.completions.create(**options)
        stream = await client.chat.completions.create(**options, stream=True)
        pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
