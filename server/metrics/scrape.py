"""The text that scrapers get: made on a thread, and not for each of them anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from server.metrics.exposition import CONTENT_TYPE

PATH: Final = "/metrics"

MAX_AGE = 0.1
"""Seconds that a text is good for: gateways ask 20 times a second."""


class Scrape:
    """Renders at most once per `MAX_AGE`; who asks meanwhile gets the same text. It is an ASGI
    application, because a route of FastAPI would cost more than the text."""

    def __init__(
        self, render: Callable[[], bytes], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._render, self._clock = render, clock
        self._text = b""
        self._made = float("-inf")
        self._rendering: asyncio.Future[None] | None = None  # the newest, done or not

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = await self.text()
        headers = [
            (b"content-length", str(len(text)).encode()),
            (b"content-type", CONTENT_TYPE.encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    async def text(self) -> bytes:
        rendering = self._rendering
        if rendering is None or (rendering.done() and self._clock() - self._made >= MAX_AGE):
            loop = asyncio.get_running_loop()
            rendering = self._rendering = loop.run_in_executor(None, self._renew)
        if not rendering.done():
            await asyncio.shield(rendering)  # others may wait for it too
        return self._text

    def _renew(self) -> None:
        self._text, self._made = self._render(), self._clock()


class ShortCut:
    """ASGI middleware, inside of `edge.KeyGuard`: takes `GET /metrics` past the layers that wait
    for bodies and look for routes. Other methods find the route, which refuses them."""

    def __init__(self, app: ASGIApp, scrape: Scrape) -> None:
        self._app, self._scrape = app, scrape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        short = scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "GET"
        await (self._scrape if short else self._app)(scope, receive, send)
