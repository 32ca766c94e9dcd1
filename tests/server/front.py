"""Front doors for the tests: an app in this process, or a real server on a port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from engine.client import EngineClient
from server.app import create_app
from server.tokenizer import TextModel
from tests.server.fake_engine import FakeEngine
from tests.server.text_models import chat_model, ids_of

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"prompt": "hello"}


def says(text: str, **options: Any) -> FakeEngine:
    """An engine that answers with `text`, whatever is asked."""
    tokens = ids_of(text)
    return FakeEngine(lambda request, index: tokens, **options)


def app_over(engine: EngineClient, text: TextModel | None = None, **options: Any) -> FastAPI:
    names = ("quiet", "quiet-2")
    return create_app(engine, text or chat_model(), served_model_names=names, **options)


class Door:
    """Requests to an app without a socket; errors of the app are answers, not exceptions."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.call("GET", path, **options)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.call("POST", "/v1/chat/completions", json=CHAT | fields)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.call("POST", "/v1/completions", json=COMPLETION | fields)


def door(engine: EngineClient, **options: Any) -> Door:
    return Door(app_over(engine, **options))


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; checks that it ends as the contract says."""
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    events = [part for part in response.text.split("\n\n") if part and not part.startswith(":")]
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


@contextlib.contextmanager
def live(app: FastAPI) -> Iterator[str]:
    """The URL of `app` on a real server in a thread."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Fails the test where `condition` does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def within(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))
