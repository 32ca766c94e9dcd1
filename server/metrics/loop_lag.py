"""How late the event loop is: what every stream waits for when something holds the loop up."""

from __future__ import annotations

import asyncio

from server.metrics.exposition import Histogram

INTERVAL = 0.1


class LoopLag:
    """A timer that observes by how much it rings too late."""

    def __init__(self, lag: Histogram) -> None:
        self._lag = lag
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self) -> None:
        """Begins with the loop that runs now; calling it again changes nothing."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._set(loop)

    def _set(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(INTERVAL, self._ring, loop, loop.time() + INTERVAL)

    def _ring(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._lag.observe(max(loop.time() - due, 0.0))
        self._set(loop)
