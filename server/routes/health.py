"""/health, /readyz, /livez and /startupz. They ask the engine nothing, so that they answer at once
however busy it is, and before there is one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response

from server.lifecycle import Lifecycle, State

PATHS: dict[str, frozenset[State]] = {
    "/health": frozenset({"ready"}),
    "/readyz": frozenset({"ready"}),
    "/livez": frozenset({"starting", "ready", "draining"}),
    "/startupz": frozenset({"ready", "draining", "stalled", "dead"}),
}
"""The checks, and in which states each is a 200."""


def checks(lifecycle: Lifecycle) -> dict[str, Callable[[], Awaitable[Response]]]:
    """What answers each path: 200, or 503 with the error; both with the state and, during the
    start, its progress."""

    def check(good: frozenset[State]) -> Callable[[], Awaitable[Response]]:
        async def answer() -> Response:
            return _answer(lifecycle, lifecycle.state in good)

        return answer

    return {path: check(good) for path, good in PATHS.items()}


def _answer(lifecycle: Lifecycle, good: bool) -> Response:
    body: dict[str, Any] = {"status": lifecycle.state}
    if lifecycle.state == "starting":
        now = lifecycle.progress
        body |= {"phase": now.phase, "done": now.done, "total": now.total, "note": now.note}
    problem = None if good else lifecycle.problem
    if problem is None:
        return Response(msgspec.json.encode(body), media_type="application/json")
    body["error"] = problem.fields()
    return Response(
        msgspec.json.encode(body), 503, headers=problem.headers, media_type="application/json"
    )
