"""What the start of a server took, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from engine.protocol import Progress


class StartupTimes:
    """Phases come one after another: each lasts until the first message of the next. The first,
    `process`, is from here to the first sign of life of the engine's process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._began = "process", clock()
        self._seconds: dict[str, float] = {}

    def take(self, message: Progress) -> None:
        """Takes the next message in."""
        if message.phase != self._phase:
            self._turn(message.phase)

    def ready(self) -> Mapping[str, float]:
        """Ends the last phase; seconds by phase."""
        self._turn("")
        return self._seconds

    def _turn(self, phase: str) -> None:
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._began
        self._phase, self._began = phase, now
