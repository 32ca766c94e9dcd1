"""What is served, and how it is: models, health, metrics, version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from engine.client import EngineDead
from server import __version__
from server.errors import from_exception
from server.service import Service


def router(service: Service) -> APIRouter:
    """The routes over `service`. None of them asks the engine's process anything."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(
            {"object": "list", "data": [_model(service, name) for name in service.names]}
        )

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_model(service, name))

    @routes.get("/health")
    async def health() -> Response:
        if not service.engine.alive:
            return from_exception(EngineDead()).response()
        return JSONResponse({"status": "ok"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.scrape(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    return routes


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "quire",
        "root": service.names[0],
        "max_model_len": service.engine.info.max_model_len,
    }
