"""What `prometheus_client` tells of the HTTP process: memory, CPU, file descriptors, garbage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

MAX_AGE: Final = 1.0
"""Seconds that a text is good for: reading /proc takes longer than all other metrics together."""


class ProcessMetrics:
    """The library's own collectors, under the names that every Python service has them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._text, self._made = b"", float("-inf")
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    @property
    def fresh(self) -> bool:
        """Whether the text is still good."""
        return self._clock() - self._made < MAX_AGE

    def render(self) -> bytes:
        """The exposition text, at most `MAX_AGE` old."""
        if not self.fresh:
            self._text, self._made = generate_latest(self._registry), self._clock()
        return self._text
