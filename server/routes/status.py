"""What is served, and how it is: models, health, version. See `health` for the checks."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from server import __version__
from server.routes.health import checks
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

    for path, check in checks(service.lifecycle).items():
        routes.add_api_route(path, check, methods=["GET"], name=path.strip("/"))

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
