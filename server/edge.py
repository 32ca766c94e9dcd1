"""What every HTTP request passes before its route: plain ASGI middleware, outermost first.

RequestId   names the request, takes the time of its arrival
AccessLog   a log line for each request
KeyGuard    401 before a byte of the body is read
Gate        503 while the server takes no new work
BodyLimit   413, from the content-length or while the body comes in
HangUp      cancels the work of a client that went away
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configs.logs import ACCESS, REQUEST_ID
from server.errors import ApiError
from server.keys import KeyRing
from server.lifecycle import Lifecycle

OPEN_PATHS = frozenset({"/", "/health", "/livez", "/readyz", "/startupz"})

LINGER_BYTES = 32 * 2**20  # of a refused body that are thrown away before the connection closes
LINGER_SECONDS = 5.0

QUIET_PATHS = OPEN_PATHS | {"/metrics"}
HUNG_UP = 499  # as proxies log a client that did not wait for its answer

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestId:
    """Echoes the client's `x-request-id`, or gives one; `scope["state"]` gets `request_id`,
    `arrival` (`time.monotonic()`, seconds) and `send`: the way to the client past all layers, for
    what comes between the first and the last part of a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = request_id_of(scope)
        state = scope.setdefault("state", {})
        state["request_id"], state["arrival"] = request_id, time.monotonic()
        state["send"] = send
        REQUEST_ID.set(request_id)

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), named]}
            await send(message)

        await self._app(scope, receive, named_send)


def request_id_of(scope: Scope) -> str:
    """The client's, or a new one where it gave none that may be echoed."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else f"req-{os.urandom(16).hex()}"


class AccessLog:
    """One line for each request when it ends, health checks and metrics left out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._logger = app, logging.getLogger(ACCESS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            return await self._app(scope, receive, send)
        status = HUNG_UP

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        finally:
            state = scope["state"]
            fields = {
                "client": (scope.get("client") or ["unknown"])[0],
                "tenant": state.get("tenant", ""),
                "seconds": round(time.monotonic() - state["arrival"], 3),
            }
            line = f"{scope['method']} {scope['path']} {status}"
            self._logger.info(line, extra={"fields": fields})


class KeyGuard:
    """Asks for `Authorization: Bearer <key>` on every path but the open ones.

    `scope["state"]` gets `tenant`: whose key it is, and "" where none was asked for.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: frozenset[str]) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        tenant = "" if scope["path"] in self._open_paths else tenant_of(scope, self._keys)
        if tenant is not None:
            scope["state"]["tenant"] = tenant
            return await self._app(scope, receive, send)
        error = ApiError(
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer <key>'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)


def tenant_of(scope: Scope, keys: KeyRing) -> str | None:
    """Whose key the request has: "" where there are none, None where it is none of `keys`."""
    if not keys:
        return ""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    owner = keys.tenant(key.strip().encode("latin-1", "replace"))
    return owner if scheme.lower() == "bearer" else None


class Gate:
    """Keeps count of the requests that make work, and refuses new ones where none is taken."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if problem := self._lifecycle.problem:
            return await problem.response()(scope, receive, send)
        with self._lifecycle.work():
            await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies above `limit` bytes without keeping them.

    Many clients read the answer only when they have sent all they have, and closing on them would
    reset the connection. So the refusal goes out at once, and what is still coming is thrown away
    for a while before the connection closes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        taken = 0
        refused = False

        async def counted_receive() -> Message:
            nonlocal taken, refused
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                refused = True
                raise self._too_large(f"more than {self._limit} bytes")
            return message

        async def lingering_send(message: Message) -> None:
            if refused and message["type"] == "http.response.body":
                await send({**message, "more_body": True})
                await _throw_away(receive)
                message = {"type": "http.response.body"}
            await send(message)

        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            refused = True
            answer = self._too_large(f"{int(declared)} bytes").response()
            return await answer(scope, receive, lingering_send)
        await self._app(scope, counted_receive, lingering_send)

    def _too_large(self, size: str) -> ApiError:
        return ApiError(
            413,
            f"the body may have at most {self._limit} bytes, got {size}",
            code="request_too_large",
            headers={"connection": "close"},
        )


async def _throw_away(receive: Receive) -> None:
    """Reads the rest of a body, within bounds."""
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0:
                message = await receive()
                if not message.get("more_body", False):
                    return
                left -= len(message["body"])


class HangUp:
    """Cancels the request's task once its client is gone and the answer is not complete.

    The watch begins when the body has been read, so that the route remains the only reader of it.
    Cancelling is told from a cancellation by others as `asyncio.timeout` does: by a mark set here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        work = asyncio.current_task()
        assert work is not None
        watch: asyncio.Task[None] | None = None
        gone = complete = False

        async def watch_for_disconnect() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            if not complete:
                gone = True
                work.cancel()

        async def watched_receive() -> Message:
            nonlocal watch
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                watch = watch or asyncio.create_task(watch_for_disconnect())
            return message

        async def watched_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        except asyncio.CancelledError:
            if not gone:
                raise
            work.uncancel()
        finally:
            if watch is not None:
                watch.cancel()
