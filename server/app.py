"""The HTTP application: one model's engine and text side, wired to routes."""

from __future__ import annotations

import math

from fastapi import FastAPI

from engine.client import EngineClient
from server import __version__, errors, openapi
from server.edge import OPEN_PATHS, BodyLimit, Gate, HangUp, KeyGuard, RequestId
from server.keys import KeyRing
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.routes import chat, completions, debug, status, steps, tokens
from server.schemas import Limits
from server.service import Service
from server.spans import Spans
from server.tokenizer import TextModel

__all__ = ["Limits", "TextModel", "create_app"]


def create_app(
    engine: EngineClient,
    text: TextModel,
    *,
    served_model_names: tuple[str, ...],
    lifecycle: Lifecycle | None = None,
    limits: Limits | None = None,
    keys: KeyRing | None = None,
    metrics_without_key: bool = False,
    spans: Spans | None = None,
) -> FastAPI:
    """The application over a running engine.

    Args:
        engine: started; closing it is the caller's.
        text: the text side of the same model, `TextModel.load(engine.info.model_path)`.
        served_model_names: what clients may put into `model`; the first is reported.
        lifecycle: of the server around it; None where there is none, as in tests.
        limits: largest body, most messages, most prompts.
        keys: one is asked of every request but health checks; None asks for nothing.
        metrics_without_key: `/metrics` asks for none either.
        spans: where OpenTelemetry spans of requests begin; closing them is the caller's.
    """
    limits = limits or Limits()
    lifecycle = lifecycle or Lifecycle(stall_timeout=math.inf, engine=engine)
    metrics = Metrics(engine.stats, served_model_names[0])
    service = Service(engine, text, metrics, served_model_names, limits, lifecycle, spans)
    app = FastAPI(title="Quire", version=__version__)
    for module in (chat, completions, debug, status, steps, tokens):
        app.include_router(module.router(service))
    errors.install(app)
    openapi.install(app)
    # The last one added is the first one met.
    app.add_middleware(HangUp)
    app.add_middleware(BodyLimit, limit=limits.max_body_bytes)
    app.add_middleware(Gate, lifecycle=lifecycle)
    open_paths = OPEN_PATHS | {"/metrics"} if metrics_without_key else OPEN_PATHS
    app.add_middleware(KeyGuard, keys=keys or KeyRing(), open_paths=open_paths)
    app.add_middleware(RequestId)
    return app
