"""One error shape for every status, and the mapping from exceptions to it.

{"error": {"message": str, "type": str, "param": str | null, "code": str | null}}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.client import EngineDead, EngineStopped, RequestFailed
from scheduler.request import InvalidRequest

if TYPE_CHECKING:  # half a second, which a server that is starting does not have
    from fastapi import FastAPI

logger = logging.getLogger("quire.server")

RETRY_AFTER_SECONDS = 5


class ApiError(Exception):
    """An answer that is an error: its status, its body and extra headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's class of the error, which follows from the status."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def fields(self) -> dict[str, str | None]:
        """What stands under `error`."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }

    def body(self) -> bytes:
        """The error as JSON."""
        return msgspec.json.encode({"error": self.fields()})

    def response(self) -> Response:
        """The error as an HTTP response."""
        return _ErrorResponse(self)


class _ErrorResponse(Response):
    """Leaves the error in `scope["state"]`, where the metrics see why the request failed."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(
            error.body(), error.status, headers=error.headers, media_type="application/json"
        )
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["error"] = self._error
        await super().__call__(scope, receive, send)


def unsupported(param: str, message: str) -> ApiError:
    """400 for a field of the contract that this server does not serve."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def invalid(param: str | None, message: str) -> ApiError:
    """400 for a value that is wrong whatever the server can do."""
    return ApiError(400, message, param=param, code="invalid_value")


def unavailable(message: str, code: str, retry_after: int = RETRY_AFTER_SECONDS) -> ApiError:
    """503 for what another try, in `retry_after` seconds or elsewhere, may well get."""
    headers = {"retry-after": str(retry_after), "x-should-retry": "true"}
    return ApiError(503, message, code=code, headers=headers)


def from_exception(error: Exception) -> ApiError:
    """What a client is told about `error`. Of anything unforeseen it learns nothing but that it
    happened: the traceback belongs in the log."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param, code=error.code)
        case EngineStopped():
            return unavailable("the server is shutting down", "shutting_down")
        case EngineDead():
            return unavailable("the engine is not running", "engine_dead")
        case RequestFailed(code="deadline_exceeded"):
            return ApiError(
                504, str(error), code="deadline_exceeded", headers={"x-should-retry": "false"}
            )
        case RequestFailed():
            return ApiError(500, str(error) or "the engine failed", code="request_failed")
        case HTTPException():
            return _from_http(error)
        case _:
            return ApiError(500, "the server hit an unexpected error", code="internal_error")


def told_in_stream(error: Exception) -> ApiError:
    """`from_exception` for a stream that has begun; logs what was unforeseen: nobody above does."""
    told = from_exception(error)
    if told.code == "internal_error":
        logger.error("unexpected error in mid-stream", exc_info=error)
    return told


def _from_http(error: HTTPException) -> ApiError:
    """404 and 405 of the router."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        error.status_code,
        str(error.detail) or HTTPStatus(error.status_code).phrase,
        code=codes.get(error.status_code, "invalid_value"),
        headers=error.headers,
    )


async def _handle(request: Request, error: Exception) -> Response:
    answer = from_exception(error)
    if answer.status in (404, 405) and isinstance(error, HTTPException):
        answer.message += f": {request.method} {request.url.path}"
    return answer.response()


async def _handle_unforeseen(request: Request, error: Exception) -> Response:
    """Called outside of all other middleware, and the error goes on to the server's log."""
    response = from_exception(error).response()
    response.headers["x-request-id"] = request.scope["state"]["request_id"]
    return response


def install(app: FastAPI) -> None:
    """Makes every error of `app` take the one shape."""
    for kind in (ApiError, InvalidRequest, EngineDead, RequestFailed, HTTPException):
        app.add_exception_handler(kind, _handle)
    app.add_exception_handler(Exception, _handle_unforeseen)
