"""Counts HTTP requests, and why those for answers failed."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import from_exception
from server.metrics import Metrics, edges
from server.metrics.exposition import Counter, Histogram
from server.metrics.failures import failure, rejection
from server.metrics.loop_lag import LoopLag

ANSWERS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
UNKNOWN: Final = "unknown"
_METHODS: Final = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")


class HttpCounts:
    """The counts of HTTP requests, and the event loop's lag from the first of them on."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry, self._lag = metrics.registry, LoopLag(metrics.event_loop_lag)
        self._requests: dict[tuple[str, str, str], Counter] = {}
        self._seconds: dict[tuple[str, str], Histogram] = {}

    def begin(self) -> None:
        """A request came in."""
        self._lag.watch()

    def end(self, handler: str, method: str, status: str, seconds: float) -> None:
        """One was answered."""
        requests = self._requests.get((handler, method, status))
        if requests is None:
            requests = self._requests[handler, method, status] = self._registry.counter(
                "http_requests_total",
                "HTTP requests.",
                bare=True,
                handler=handler,
                method=method,
                status=status,
            )
        requests.inc()
        duration = self._seconds.get((handler, method))
        if duration is None:
            duration = self._seconds[handler, method] = self._registry.histogram(
                "http_request_duration_seconds",
                "From the arrival of an HTTP request to the last byte of its answer.",
                edges.HTTP,
                bare=True,
                handler=handler,
                method=method,
            )
        duration.observe(seconds)


class HttpMeter:
    """ASGI middleware, inside of `edge.RequestId`. A label is never what a client wrote: handlers
    are templates of routes, methods those that there are."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, counts: HttpCounts, templates: Collection[str]
    ) -> None:
        """Args:
        templates: paths of the routes.
        """
        self._app, self._metrics, self._counts = app, metrics, counts
        self._templates = frozenset(templates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        self._counts.begin()
        status = 0  # none was sent
        complete = False

        async def metered_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, metered_send)
        except Exception:
            status = status or 500
            raise
        finally:
            self._count(scope, status)
            if scope["path"] in ANSWERS and scope["method"] == "POST":
                self._count_failure(scope, status, complete)

    def _count(self, scope: Scope, status: int) -> None:
        handler, method = self._handler(scope), scope["method"]
        method = method if method in _METHODS else UNKNOWN
        seconds = time.monotonic() - scope["state"]["arrival"]
        kind = f"{(status or 499) // 100}xx"  # nothing sent: the client went away
        self._counts.end(handler, method, kind, seconds)

    def _handler(self, scope: Scope) -> str:
        if "route" in scope:
            return str(scope["route"].path)
        return scope["path"] if scope["path"] in self._templates else UNKNOWN

    def _count_failure(self, scope: Scope, status: int, complete: bool) -> None:
        """What a request for answers failed of, if it did. Where the stream had begun, only its
        generation knows."""
        state = scope["state"]
        generation = state.get("generation")
        error = state.get("error")
        if error is None and generation is not None and generation.error is not None:
            error = from_exception(generation.error)
        if error is not None:
            self._metrics.failed(failure(error))
            if (reason := rejection(error)) is not None:
                self._metrics.rejected(reason)
        elif status >= 500:
            self._metrics.failed("engine_error")
        elif not complete and not (generation is not None and generation.complete):
            self._metrics.failed("client_disconnect")
