"""Times of the engine's steps, for the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.protocol import StepReport


class StepMeter:
    """A stop watch: `begin`, `planned`, `computed`, then `ended`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._planned = self._computed = 0.0

    def begin(self) -> None:
        self._began = self._clock()

    def planned(self) -> None:
        self._planned = self._clock()

    def computed(self) -> float:
        """Seconds since `planned`."""
        self._computed = self._clock()
        return self._computed - self._planned

    def ended(self, tokens: int) -> StepReport:
        """The step computed `tokens` and was committed."""
        now = self._clock()
        scheduling = self._planned - self._began + now - self._computed
        return StepReport(tokens, now - self._began, scheduling, time.time())
