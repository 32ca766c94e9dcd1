"""The text that scrapers get: made on a thread where it takes long, and not for each anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge import request_id_of, tenant_of
from server.keys import KeyRing
from server.metrics.exposition import CONTENT_TYPE
from server.metrics.http_meter import HttpCounts

PATH: Final = "/metrics"

MAX_AGE = 0.1
"""Seconds that a text is good for: gateways ask 20 times a second."""

_CONTENT_TYPE: Final = (b"content-type", CONTENT_TYPE.encode())


class Scrape:
    """Renders at most once per `MAX_AGE`; who asks meanwhile gets the same text. It is an ASGI
    application, because a route of FastAPI would cost more than the text.

    Args:
        render: makes the text; it is called on a thread, so that no stream waits for it.
        quiet: whether it hardly has anything to do. To wake a thread and be woken by it would
            cost twice as much then, and it is called on the event loop.
    """

    def __init__(
        self,
        render: Callable[[], bytes],
        quiet: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._render, self._quiet, self._clock = render, quiet, clock
        self._text = b""
        self._made = float("-inf")
        self._rendering: asyncio.Future[None] | None = None  # the newest, done or not

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(send)

    async def answer(self, send: Send, *headers: tuple[bytes, bytes]) -> None:
        """Sends the text, with `headers` beside its own."""
        text = await self.text()
        own = ((b"content-length", b"%d" % len(text)), _CONTENT_TYPE)
        await send({"type": "http.response.start", "status": 200, "headers": [*own, *headers]})
        await send({"type": "http.response.body", "body": text})

    async def text(self) -> bytes:
        rendering = self._rendering
        if rendering is None or (rendering.done() and self._clock() - self._made >= MAX_AGE):
            if self._quiet():
                self._renew()
                return self._text
            loop = asyncio.get_running_loop()
            rendering = self._rendering = loop.run_in_executor(None, self._renew)
        if not rendering.done():
            await asyncio.shield(rendering)  # others may wait for it too
        return self._text

    def _renew(self) -> None:
        self._text, self._made = self._render(), self._clock()


class ShortCut:
    """Stands in front of the application: takes `GET /metrics` past them. Between two scrapes the
    process sleeps, so that each layer has to come from memory anew. What they do for every request
    is done here in few words; who has no key, or another method, goes the long way to a refusal.
    """

    def __init__(self, app: ASGIApp, scrape: Scrape, keys: KeyRing, counts: HttpCounts) -> None:
        self._app, self._scrape, self._keys, self._counts = app, scrape, keys, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        short = scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "GET"
        if not short or tenant_of(scope, self._keys) is None:
            return await self._app(scope, receive, send)
        arrival = time.monotonic()
        self._counts.begin()
        await self._scrape.answer(send, (b"x-request-id", request_id_of(scope).encode()))
        self._counts.end(PATH, "GET", "2xx", time.monotonic() - arrival)
