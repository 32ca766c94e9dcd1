"""The HTTP application: one model's engine and text side, wired to routes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from engine.client import EngineClient
from server import __version__, errors, openapi
from server.edge import OPEN_PATHS, AccessLog, BodyLimit, Gate, HangUp, KeyGuard, RequestId
from server.keys import KeyRing
from server.lifecycle import Lifecycle
from server.metrics import Metrics, Slo
from server.metrics.http_meter import HttpCounts, HttpMeter
from server.metrics.scrape import PATH, Scrape, ShortCut
from server.queue_bound import QueueBound, QueueLimits
from server.reading import ParserNames
from server.routes import (
    chat,
    completions,
    debug,
    explain,
    page,
    requests,
    responses,
    status,
    steps,
    tokens,
)
from server.schemas import Limits
from server.service import Service
from server.spans import Spans
from server.tokenizer import TextModel

__all__ = ["Limits", "ParserNames", "TextModel", "create_app"]


class Application(FastAPI):
    """FastAPI's, with a place in front of everything."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.front: ASGIApp = super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.front(scope, receive, send)


def create_app(
    engine: EngineClient,
    text: TextModel,
    *,
    served_model_names: tuple[str, ...],
    lifecycle: Lifecycle | None = None,
    limits: Limits | None = None,
    queue: QueueLimits | None = None,
    keys: KeyRing | None = None,
    metrics_without_key: bool = False,
    spans: Spans | None = None,
    slo: Slo | None = None,
    startup: Mapping[str, float] | None = None,
    parsers: ParserNames | None = None,
) -> Application:
    """The application over a running engine.

    Args:
        engine: started; closing it is the caller's.
        text: the text side of the same model, `TextModel.load(engine.info.model_path)`.
        served_model_names: what clients may put into `model`; the first is reported.
        lifecycle: of the server around it; None where there is none, as in tests.
        limits: largest body, most messages, most prompts.
        queue: how many requests may wait for their first token.
        keys: one is asked of every request but health checks; None asks for nothing.
        metrics_without_key: `/metrics` asks for none either.
        spans: where OpenTelemetry spans of requests begin; closing them is the caller's.
        slo: what the metrics count as good.
        startup: seconds that each phase of the start took, for the metrics.
        parsers: how tool calls and thoughts are written; None asks the chat template.
    """
    limits = limits or Limits()
    lifecycle = lifecycle or Lifecycle(stall_timeout=math.inf, engine=engine)
    metrics = Metrics(
        engine.stats,
        engine.info,
        served_model_names[0],
        slo=slo,
        startup=startup,
        stalled=lambda: lifecycle.state == "stalled",
    )
    engine.listen(metrics.heard)
    parsers = parsers or ParserNames()
    service = Service(
        engine,
        text,
        metrics,
        served_model_names,
        limits,
        lifecycle,
        QueueBound(queue),
        spans,
        parsers,
    )
    # Spans are `server.spans`': FastAPI's own would look for a provider at every request.
    app = Application(
        title="Quire",
        version=__version__,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    scrape = Scrape(metrics.render, lambda: metrics.quiet)
    app.router.routes.append(Route(PATH, scrape, methods=["GET"]))
    answering = (chat, completions, responses)
    for module in (*answering, debug, explain, page, requests, status, steps, tokens):
        app.include_router(module.router(service))
    errors.install(app)
    openapi.install(app)
    # The last one added is the first one met.
    app.add_middleware(HangUp)
    app.add_middleware(BodyLimit, limit=limits.max_body_bytes)
    app.add_middleware(Gate, lifecycle=lifecycle)
    keys = keys or KeyRing()
    open_paths = OPEN_PATHS | {PATH} if metrics_without_key else OPEN_PATHS
    app.add_middleware(KeyGuard, keys=keys, open_paths=open_paths)
    templates = [route.path for route in app.routes if isinstance(route, Route)]
    counts = HttpCounts(metrics)
    app.add_middleware(HttpMeter, metrics=metrics, counts=counts, templates=templates)
    app.add_middleware(AccessLog)
    app.add_middleware(RequestId)
    proxies = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")  # uvicorn's name of them
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=proxies)
    scrape_keys = KeyRing() if metrics_without_key else keys
    app.front = ShortCut(app.front, scrape, scrape_keys, counts)
    return app
