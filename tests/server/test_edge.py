"""What stands before the routes: keys, sizes, names of requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from server import edge
from server.edge import OPEN_PATHS, KeyGuard
from server.keys import KeyRing
from server.schemas import Limits
from tests.server.front import CHAT, app_over, door, live, says

KEY = "sk-söcret"
KEYS = KeyRing([("sk-other", "other"), (KEY, "")])
CHAT_PATH = "/v1/chat/completions"


def paths_of(routes: list[BaseRoute]) -> list[tuple[str, str]]:
    """Method and path of every route, those of included routers too."""
    found: list[tuple[str, str]] = []
    for route in routes:
        nested = getattr(route, "original_router", None)
        if nested is not None:
            found += paths_of(nested.routes)
        for method in sorted(getattr(route, "methods", None) or ()):
            found.append((method, getattr(route, "path", "").replace("{name:path}", "quiet")))
    return found


ROUTES = paths_of(app_over(says("x")).routes)


def test_the_routes_are_found() -> None:
    assert {("POST", CHAT_PATH), ("GET", "/health"), ("GET", "/v1/models")} <= set(ROUTES)


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/none"), ("POST", "/health/../v1")])
def test_every_route_asks_for_the_key(method: str, path: str) -> None:
    front = door(says("x"), keys=KEYS)
    for headers in ({}, {"authorization": b"Bearer sk"}):
        response = front.call(method, path, headers=headers)
        if path in OPEN_PATHS:
            assert response.status_code == 200
            continue
        assert response.status_code == 401
        if method != "HEAD":
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    for key in ("sk-other", KEY):
        answer = front.call(method, path, headers={"authorization": f"Bearer {key}".encode()})
        assert answer.status_code != 401


def test_metrics_can_be_open() -> None:
    front = door(says("x"), keys=KEYS, metrics_without_key=True)
    assert front.get("/metrics").status_code == 200
    assert front.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("path", "keys", "key", "tenant"),
    [
        ("/v1", KEYS, "sk-other", "other"),
        ("/v1", KEYS, KEY, "key-2f2271c0"),
        ("/health", KEYS, "sk-other", ""),
        ("/v1", KeyRing(), "sk-other", ""),
    ],
)
def test_routes_learn_whose_key_it_is(path: str, keys: KeyRing, key: str, tenant: str) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["tenant"])

    async def unused() -> Message:
        raise AssertionError

    async def ignore(message: Message) -> None: ...

    headers = [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "path": path, "headers": headers, "state": {}}
    asyncio.run(KeyGuard(app, keys, OPEN_PATHS)(scope, unused, ignore))
    assert seen == [tenant]


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer sk", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer é"],
)
def test_bad_keys(value: str) -> None:
    headers = {"authorization": value.encode()}
    response = door(says("x"), keys=KEYS).get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert KEY not in response.text


def test_no_key_no_question() -> None:
    front = door(says("x"))
    for path in ("/v1/models", "/docs", "/openapi.json"):
        assert front.get(path).status_code == 200


def test_request_id_goes_out_as_it_came_in() -> None:
    front = door(says("x"), keys=KEYS)
    for path in ("/health", "/v1/models", "/none"):
        response = front.get(path, headers={"x-request-id": "my-id:7"})
        assert response.headers["x-request-id"] == "my-id:7"
    given = {front.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(given) == 3
    for bad in ("a b", "x" * 129, "é"):
        response = front.get("/health", headers={"x-request-id": bad.encode()})
        assert response.headers["x-request-id"].startswith("req-")


class Body:
    """A body in parts, and how many of them were read."""

    def __init__(self, parts: int, size: int) -> None:
        self.parts, self.size, self.read = parts, size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.parts):
            self.read += 1
            yield b" " * self.size


def check_too_large(response: httpx.Response) -> None:
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["code"] == "request_too_large"
    assert "1000 bytes" in error["message"]


def test_too_large_by_its_declared_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "LINGER_BYTES", 0)
    body = Body(50, 100)
    response = door(says("x"), limits=Limits(max_body_bytes=1000)).call(
        "POST", CHAT_PATH, content=body, headers={"content-length": "5000"}
    )
    check_too_large(response)
    assert "5000" in response.json()["error"]["message"]
    assert body.read == 0


def test_too_large_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "LINGER_BYTES", 0)
    body = Body(50, 100)
    front = door(says("x"), limits=Limits(max_body_bytes=1000))
    check_too_large(front.call("POST", CHAT_PATH, content=body))
    assert body.read == 11
    # An exact fit is read; it is no JSON.
    assert front.call("POST", CHAT_PATH, content=Body(10, 100)).status_code == 400


async def post_live(url: str, body: Body, *, chunked: bool) -> httpx.Response:
    headers = {} if chunked else {"content-length": str(body.parts * body.size)}
    async with httpx.AsyncClient() as client:
        return await client.post(url + CHAT_PATH, content=body, headers=headers)


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_over_a_socket(chunked: bool) -> None:
    """A client that reads nothing before it has sent everything gets its answer too."""
    with live(app_over(says("x"), limits=Limits(max_body_bytes=1000))) as url:
        check_too_large(asyncio.run(post_live(url, Body(500, 10_000), chunked=chunked)))
        assert httpx.post(url + CHAT_PATH, json=CHAT).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_endless_body_is_cut(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "LINGER_BYTES", 2**20)
    body = Body(10_000, 10_000)
    with live(app_over(says("x"), limits=Limits(max_body_bytes=1000))) as url:
        with contextlib.suppress(httpx.TransportError):
            check_too_large(asyncio.run(post_live(url, body, chunked=chunked)))
        assert body.read < 5000
        assert httpx.post(url + CHAT_PATH, json=CHAT).status_code == 200


def test_answers_with_an_unguessable_field_name() -> None:
    """Header values are never made of what a client could choose freely."""
    fields: dict[str, Any] = {f"x{i}\r\nset-cookie: a": 1 for i in range(5)}
    response = door(says("x")).chat(**fields, **{f"f{i}": 1 for i in range(100)})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    assert len(response.headers["x-ignored-params"]) < 400


def test_the_access_log_tells_each_request_but_checks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "quire.access")
    front = door(says("x"), keys=KEYS)
    for path in ("/health", "/readyz", "/metrics", "/none", "/v1/models?key=secret"):
        front.get(path, headers={"authorization": "Bearer sk-other"})
    front.get("/v1/models")
    assert caplog.messages == ["GET /none 404", "GET /v1/models 200", "GET /v1/models 401"]
    fields = caplog.records[1].__dict__["fields"]
    assert (fields["tenant"], fields["client"]) == ("other", "127.0.0.1")


def test_the_access_log_tells_the_client_behind_a_proxy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "quire.access")
    door(says("x")).get("/none", headers={"x-forwarded-for": "203.0.113.9"})
    assert caplog.records[0].__dict__["fields"]["client"] == "203.0.113.9"


def test_prompts_are_logged_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    front = door(says("x"))
    caplog.set_level("DEBUG")
    logger = logging.getLogger("quire.prompts")
    for wanted in (False, True):
        logger.disabled = not wanted
        front.complete(prompt="a secret")
        front.complete(prompt="a secret", temperature="hot")
        assert ("a secret" in caplog.text) == wanted
