"""GET /v1/requests and DELETE /v1/requests/{id}: what is being worked on, and an end to it."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from engine.protocol import RequestView
from server.errors import ApiError
from server.service import Service


def router(service: Service) -> APIRouter:
    """The routes over `service`. A key sees its own requests, and no others."""
    routes = APIRouter()

    @routes.get("/v1/requests")
    async def requests(http: HttpRequest) -> Response:
        """Running ones, then the queue in its order."""
        data = [_fields(view) for view in await _own(service, http)]
        return _json({"object": "list", "data": data})

    @routes.delete("/v1/requests/{request_id}")
    async def delete(http: HttpRequest, request_id: str) -> Response:
        """Ends a request; whoever waits for it gets an error `aborted`."""
        if all(view.id != request_id for view in await _own(service, http)):
            raise ApiError(
                404, f"there is no live request {request_id!r}", param="id", code="not_found"
            )
        service.engine.abort(request_id)
        return _json({"id": request_id, "object": "request", "deleted": True})

    return routes


async def _own(service: Service, http: HttpRequest) -> list[RequestView]:
    tenant = http.scope["state"].get("tenant", "")
    return [view for view in await service.engine.requests() if view.tenant == tenant]


def _fields(view: RequestView) -> dict[str, Any]:
    fields = msgspec.structs.asdict(view)
    del fields["tenant"]
    return {"id": fields.pop("id"), "object": "request", **fields}


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
