"""The text that scrapers get: made on a thread, and not for each of them anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.metrics.exposition import CONTENT_TYPE

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
        self._rendering: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Response(await self.text(), media_type=CONTENT_TYPE)(scope, receive, send)

    async def text(self) -> bytes:
        if self._rendering is None and self._clock() - self._made >= MAX_AGE:
            self._rendering = asyncio.create_task(self._renew())
        if self._rendering is not None:
            await asyncio.shield(self._rendering)  # others may wait for it too
        return self._text

    async def _renew(self) -> None:
        made = self._clock()
        try:
            self._text = await asyncio.to_thread(self._render)
            self._made = made
        finally:
            self._rendering = None
