"""Ends an engine that stands still: better restarted than hanging."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from engine.loop import EngineLoop
from engine.protocol import STALLED

logger = logging.getLogger("quire.engine")

TICKS = 20  # looks at the loop per timeout
MOST_TOLD = 50  # sequences


class StallWatch(threading.Thread):
    """Watches a loop from a thread of its own.

    Time is counted in looks, not read from a clock: a machine that was suspended has not stalled.
    """

    def __init__(
        self, loop: EngineLoop, timeout: float, end: Callable[[int], object] = os._exit
    ) -> None:
        """`timeout`: seconds with work and without a step after which `end` is called with the
        exit code, all stacks and the scheduler's state being in the log."""
        super().__init__(name="stall-watch", daemon=True)
        self._loop, self._timeout, self._end = loop, timeout, end

    def run(self) -> None:
        steps, quiet = -1, 0
        while quiet < TICKS:
            time.sleep(self._timeout / TICKS)
            moved = self._loop.progress != steps
            steps = self._loop.progress
            quiet = 0 if moved or not self._loop.scheduler.has_work else quiet + 1
        try:
            logger.critical(
                "stalled: work, and no step for %g s",
                self._timeout,
                extra={"details": f"{scheduler_state(self._loop)}\n{all_stacks()}"},
            )
        finally:
            self._end(STALLED)


def scheduler_state(loop: EngineLoop) -> str:
    """Counts, and a line for each sequence."""
    scheduler = loop.scheduler
    sequences = [*scheduler.running, *scheduler.waiting]
    pool = scheduler.cache.pool
    lines = [
        f"after {loop.progress} steps: {len(scheduler.running)} running, "
        f"{len(scheduler.waiting)} waiting, {pool.num_used} of {pool.num_blocks} blocks used"
    ]
    lines += [
        f"{seq.request.id}[{seq.index}] {seq.status.value}: {seq.num_computed} of "
        f"{len(seq.tokens)} tokens computed, {seq.in_flight} in flight, "
        f"request_id={seq.request.x_request_id}"
        for seq in sequences[:MOST_TOLD]
    ]
    return "\n".join(lines)


def all_stacks() -> str:
    """Where every thread is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
