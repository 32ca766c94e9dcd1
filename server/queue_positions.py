"""Places in the engine's queue, for those who wait and want to know."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable

from engine.client import EngineClient, EngineDead

MAX_AGE = 1.0  # seconds for which one list is good enough, however many ask
PATIENCE = 1.0  # seconds that the engine has to answer: it does between two steps


class QueuePositions:
    """Asks the engine for the list of live requests, at most once per `MAX_AGE`."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._places: dict[str, int] = {}
        self._read = -MAX_AGE
        self._reading = asyncio.Lock()

    async def first(self, request_ids: Iterable[str]) -> int | None:
        """The best place of any of them, from 1; None where none waits in the queue, or the engine
        does not say."""
        async with self._reading:
            if time.monotonic() - self._read > MAX_AGE:
                await self._read_places()
        places = (self._places.get(request_id) for request_id in request_ids)
        return min((place for place in places if place is not None), default=None)

    async def _read_places(self) -> None:
        self._places = {}
        with contextlib.suppress(EngineDead, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                views = await self._engine.requests()
            self._places = {v.id: v.position for v in views if v.position is not None}
        self._read = time.monotonic()
