"""What a server is doing, from its start to its end: `launch` writes it, health checks read it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Literal

from engine.client import EngineClient
from engine.protocol import Progress
from server.errors import ApiError, unavailable

State = Literal["starting", "ready", "draining", "stalled", "dead"]


class Lifecycle:
    """starting -> ready -> draining; a running engine may also be stalled or dead.

    Attributes:
        engine: None until requests can be served.
        draining: whether the server waits for its last answers.
        progress: the newest news of the start.
        running: requests being worked on, health checks and other reading aside.
    """

    def __init__(self, stall_timeout: float, engine: EngineClient | None = None) -> None:
        """`stall_timeout`: seconds without a step, while there is work, that are too many."""
        self.engine = engine
        self.draining = False
        self.progress = Progress("engine", 0, 0)
        self.running = 0
        self._stall_timeout = stall_timeout
        self._began = time.monotonic()
        self._idle = asyncio.Event()

    @property
    def state(self) -> State:
        if self.engine is None:
            return "starting"
        if not self.engine.alive:
            return "dead"
        if self.engine.quiet_seconds > self._stall_timeout:
            return "stalled"
        return "draining" if self.draining else "ready"

    @property
    def problem(self) -> ApiError | None:
        """Why no new work is taken; None where it is."""
        match self.state:
            case "ready":
                return None
            case "starting":
                return unavailable(f"the server is starting: {self._progress()}", "starting")
            case "draining":
                return unavailable("the server is shutting down", "shutting_down")
            case "stalled":
                return unavailable("the engine makes no progress", "engine_stalled")
            case "dead":
                return unavailable("the engine is not running", "engine_dead")

    def _progress(self) -> str:
        now = self.progress
        share = f" {now.done / now.total:.0%}" if now.total else ""
        return f"{now.phase}{share}, {time.monotonic() - self._began:.0f} s"

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """One request being worked on."""
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no request is being worked on."""
        if self.running:
            await self._idle.wait()
