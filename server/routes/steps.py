"""GET /debug/steps and GET /v1/requests/{id}/trace: what the scheduler did, and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from engine.protocol import TraceView
from server.errors import ApiError, invalid
from server.perfetto import render
from server.service import Service
from server.timeline import ids_of, request_fields, step_fields, steps

DEFAULT_STEPS = 100
FORMATS = ("json", "perfetto")

_QUERY = {  # read by hand, so that errors have the one shape
    "parameters": [
        {"name": "format", "in": "query", "schema": {"enum": FORMATS, "default": FORMATS[0]}},
        {
            "name": "last",
            "in": "query",
            "schema": {"type": "integer", "minimum": 1, "default": DEFAULT_STEPS},
        },
    ]
}


def router(service: Service) -> APIRouter:
    """The routes over `service`. They render in pieces, on a thread, beside the streams."""
    routes = APIRouter()

    @routes.get("/debug/steps", openapi_extra=_QUERY)
    async def debug_steps(http: HttpRequest) -> Response:
        """`format` is json or perfetto; `last` cuts the json to so many steps."""
        last = http.query_params.get("last", str(DEFAULT_STEPS))
        if not last.isdecimal() or int(last) < 1:
            raise invalid("last", f"last must be a number of at least 1, got {last!r}")
        form = http.query_params.get("format", FORMATS[0])
        if form not in FORMATS:
            raise invalid("format", f"format must be {' or '.join(FORMATS)}, got {form!r}")
        view = await _read(service)
        if form == "perfetto":
            return StreamingResponse(
                render(view),
                media_type="application/json",
                headers={"content-disposition": 'attachment; filename="quire-trace.json"'},
            )
        return StreamingResponse(_as_json(view, int(last)), media_type="application/json")

    @routes.get("/v1/requests/{request_id}/trace")
    async def request_trace(http: HttpRequest, request_id: str) -> Response:
        """A tenant sees its own requests, and no others."""
        view = await _read(service)
        names = ids_of(view, request_id, http.scope["state"]["tenant"])
        if not names:
            raise ApiError(
                404,
                f"nothing is known of request {request_id!r}: the last {view.keep} steps had no "
                "part of it",
                param="id",
                code="request_not_found",
            )
        fields = request_fields(view, request_id, names)
        return Response(msgspec.json.encode(fields), media_type="application/json")

    return routes


async def _read(service: Service) -> TraceView:
    view = await service.engine.trace()
    if not view.keep:
        raise ApiError(404, "the step trace is off: see --trace-steps", code="trace_off")
    return view


def _as_json(view: TraceView, last: int) -> Iterator[bytes]:
    encode = msgspec.json.encode
    yield b'{"keep":' + encode(view.keep) + b',"steps":['
    separator = b"\n"
    planned = sum(record.step >= 0 for record in view.steps)
    for step in islice(steps(view), max(planned - last, 0), None):
        yield separator + encode(step_fields(step, view))
        separator = b",\n"
    yield b"\n]}\n"
