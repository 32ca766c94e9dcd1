"""How much of the held KV blocks is empty."""

from __future__ import annotations

import time
from collections.abc import Callable

from scheduler.scheduler import Scheduler

INTERVAL = 0.1
"""Seconds between two looks: one takes time with the number of running sequences."""


class Fragmentation:
    """The share of the places in held blocks that hold no token, 0 to 1: ends of last blocks, and
    room for prompts that are still being read."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler, self._clock = scheduler, clock
        self._due, self._share = 0.0, 0.0

    def measure(self) -> float:
        """The share at the last look; there is a new one where that was long ago."""
        now = self._clock()
        if not self._scheduler.running:
            self._share = 0.0
        elif now >= self._due:
            self._due, self._share = now + INTERVAL, self._look()
        return self._share

    def _look(self) -> float:
        cache = self._scheduler.cache
        # Blocks that are shared are full: every empty place is in a block of one sequence.
        empty = sum(
            max(len(table) * cache.block_size - seq.num_computed, 0)
            for seq in self._scheduler.running
            for table in seq.blocks.tables
        )
        places = cache.pool.num_used * cache.block_size
        return min(empty / places, 1.0) if places else 0.0
