"""Why requests fail, in the few words that a label may take."""

from __future__ import annotations

from typing import Final

from server.errors import ApiError

FAILURES: Final = (
    "validation",
    "overloaded",
    "timeout",
    "client_disconnect",
    "engine_error",
    "aborted",
)
REJECTIONS: Final = ("queue_full", "rate_limit_exceeded", "unavailable")

_ENGINE_CODES = ("engine_dead", "engine_stalled", "request_failed")


def failure(error: ApiError) -> str:
    """One of `FAILURES`."""
    if error.code == "aborted":
        return "aborted"
    if error.code in _ENGINE_CODES:
        return "engine_error"
    if error.status in (429, 503):
        return "overloaded"
    if error.status in (408, 504):
        return "timeout"
    return "validation" if error.status < 500 else "engine_error"


def rejection(error: ApiError) -> str | None:
    """One of `REJECTIONS` where the request may well succeed later, else None."""
    if failure(error) != "overloaded":
        return None
    return error.code if error.code in REJECTIONS else "unavailable"
