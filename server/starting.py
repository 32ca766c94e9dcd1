"""The application of a server that is still starting: it needs neither engine nor model."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.edge import OPEN_PATHS, KeyGuard, RequestId
from server.keys import KeyRing
from server.lifecycle import Lifecycle
from server.routes.health import checks


def starting_app(lifecycle: Lifecycle, keys: KeyRing) -> ASGIApp:
    """Answers health checks, and 503 to everything else."""
    known = checks(lifecycle)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        problem = lifecycle.problem
        assert problem is not None, "a server that is ready has other routes"
        check = known.get(scope["path"])
        response = problem.response() if check is None else await check()
        await response(scope, receive, send)

    return RequestId(KeyGuard(app, keys, OPEN_PATHS))
