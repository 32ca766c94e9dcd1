"""A server from its start to its end, over an engine process that only pretends to compute."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.front import wait_for
from tests.server.pretend import HANGS, RAISES

ROOT = Path(__file__).parents[2]
LONG = {"prompt": "hello", "max_tokens": 200, "stream": True}


class Server:
    """`quire serve` on a free port; what it printed is in `lines`."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.server.pretend", "serve", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.output)
        assert found, self.output
        return found[0]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def complete(self, request_id: str = "", **fields: Any) -> httpx.Response:
        body = {"prompt": "hello", "max_tokens": 3} | fields
        headers = {"x-request-id": request_id}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=30)

    @property
    def engine(self) -> int:
        """The engine's process: the child that `multiprocessing` spawned."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                command = (stat.parent / "cmdline").read_bytes()
                if parent == self.process.pid and b"spawn_main" in command:
                    return int(stat.parent.name)
        raise AssertionError("there is no engine")

    def exit_code(self) -> int:
        code = self.process.wait(20)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Server]:
    server = Server("--port", "0", *flags)
    try:
        wait_for(lambda: "curl" in server.output or server.process.poll() is not None, 60)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


async def streams(url: str, count: int, then: Any) -> list[str]:
    """The whole texts of `count` streams; `then` is called when each has begun."""
    begun = 0
    everybody = asyncio.Event()

    async def stream(client: httpx.AsyncClient) -> str:
        nonlocal begun
        text = ""
        async with client.stream("POST", f"{url}/v1/completions", json=LONG) as response:
            assert response.status_code == 200
            async for part in response.aiter_text():
                if not text:
                    begun += 1
                    if begun == count:
                        everybody.set()
                text += part
        return text

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=count), timeout=60) as client:
        running = [asyncio.create_task(stream(client)) for _ in range(count)]
        await asyncio.wait_for(everybody.wait(), 30)
        await asyncio.to_thread(then)
        return await asyncio.gather(*running)


def is_whole(text: str) -> bool:
    return '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")


def is_told(text: str, code: str) -> bool:
    return f'"code":"{code}"' in text and text.endswith("data: [DONE]\n\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_while_it_starts(tmp_path: Path) -> None:
    go, port = tmp_path / "go", free_port()
    server = Server("--port", str(port), "--model", f"until:{go}", "--api-key", "sk")
    url = f"http://127.0.0.1:{port}"
    key = {"authorization": "Bearer sk"}

    def asked(path: str) -> httpx.Response | None:
        with contextlib.suppress(httpx.ConnectError):
            return httpx.get(url + path, timeout=10)
        return None

    try:
        wait_for(lambda: (found := asked("/startupz")) and found.json()["phase"] == "weights", 60)
        for path in ("/startupz", "/health", "/readyz"):
            found = httpx.get(url + path)
            assert (found.status_code, found.json()["status"]) == (503, "starting")
            assert (found.json()["done"], found.json()["total"]) == (1024, 4096)
            assert "weights 25%" in found.json()["error"]["message"]
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        refused = httpx.post(f"{url}/v1/completions", json=LONG, headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
        assert int(refused.headers["retry-after"]) <= 60
        go.touch()
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        assert httpx.get(f"{url}/startupz").json() == {"status": "ready"}
        body = {"prompt": "hello", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=key).status_code == 200
        started = [json.loads(line) for line in server.lines]
        ready = next(place for place, line in enumerate(started) if line["message"] == "ready")
        assert ready < 15
        assert [line["message"].split(":")[0] for line in started[:ready]] == ["engine", "weights"]
        assert started[ready]["address"] == url and started[ready]["API key"] == "on"
    finally:
        server.process.kill()
        server.process.wait()


def test_sigterm_under_32_streams() -> None:
    with serving() as server:

        def terminate() -> None:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.get("/readyz").status_code == 503)
            refused = server.complete()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in refused.headers
            assert server.get("/livez").status_code == 200

        texts = asyncio.run(streams(server.url, 32, terminate))
        assert sum(map(is_whole, texts)) == 32
        assert server.exit_code() == 0
        assert "waiting up to 30 s for 32 running requests" in server.output


def test_what_does_not_end_in_time_ends_with_an_error() -> None:
    with serving("--shutdown-timeout", "0.1") as server:
        stop = lambda: server.process.send_signal(signal.SIGTERM)  # noqa: E731
        texts = asyncio.run(streams(server.url, 4, stop))
        assert all(is_told(text, "shutting_down") for text in texts)
        assert server.exit_code() == 0


def test_a_second_signal_ends_at_once() -> None:
    with serving() as server:

        def twice() -> None:
            server.process.send_signal(signal.SIGINT)
            wait_for(lambda: "stopping" in server.output)
            os.kill(server.engine, signal.SIGSTOP)  # nothing ends by itself any more
            server.process.send_signal(signal.SIGINT)

        with contextlib.suppress(httpx.RemoteProtocolError):
            asyncio.run(streams(server.url, 4, twice))
        assert server.exit_code() == 0


def test_a_killed_engine_is_told_to_all_and_ends_the_server() -> None:
    with serving() as server:
        kill = lambda: os.kill(server.engine, signal.SIGKILL)  # noqa: E731
        texts = asyncio.run(streams(server.url, 16, kill))
        assert all(is_told(text, "engine_dead") for text in texts)
        assert server.exit_code() == 1
        assert "the engine is gone (exit code -9)" in server.output


def test_a_stopped_engine_is_noticed_and_ends_the_server() -> None:
    with serving("--stall-timeout", "1") as server:

        def stop() -> None:
            assert server.get("/livez").status_code == 200
            os.kill(server.engine, signal.SIGSTOP)
            wait_for(lambda: server.get("/livez").status_code == 503)
            assert server.get("/livez").json()["error"]["code"] == "engine_stalled"

        texts = asyncio.run(streams(server.url, 4, stop))
        assert all(is_told(text, "engine_dead") for text in texts)
        assert server.exit_code() == 70


def test_a_step_that_hangs_is_told_with_stacks() -> None:
    with serving("--stall-timeout", "0.5") as server:
        time.sleep(1)  # idle is no stall
        assert server.get("/livez").status_code == 200
        answer = server.complete("mine-2", prompt=[HANGS])
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert server.exit_code() == 70
        assert "1 running, 0 waiting" in server.output
        assert "in flight, request_id=mine-2" in server.output
        assert "time.sleep(3600)" in server.output
        assert server.output.count("stalled: ") == 1


@pytest.mark.parametrize(
    ("log_format", "named"),
    [("json", '"request_ids": ["mine-1"]'), ("text", "request_ids=['mine-1']")],
)
def test_a_step_that_raises_ends_its_requests_alone(log_format: str, named: str) -> None:
    with serving("--log-format", log_format) as server:
        answer = server.complete("mine-1", prompt=[RAISES])
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_failed")
        assert server.complete().status_code == 200
        assert server.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert "a kernel failed" in server.output
        [line] = [line for line in server.lines if "quire.engine" in line]
        assert named in line
