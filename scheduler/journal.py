"""What the scheduler tells about its decisions to whoever wants to know."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.sequence import Sequence


class Wait(Enum):
    """Why the first of the queue was not started in a step."""

    BUDGET = "budget"  # the step's tokens were given to others
    SLOT = "no slot"  # as many sequences run as may
    BLOCKS = "no blocks"  # too few KV blocks are free
    LEADER = "leader's prompt"  # another answer of its request still reads the prompt of both
    DISK = "disk"  # KV blocks of its beginning are being read; others may pass it
    PREEMPTION = "preemption"  # somebody lost blocks in this step: nobody new comes in


class Journal:
    """Called at each decision, between and within steps. This one keeps nothing."""

    def queued(self, seq: Sequence) -> None:
        """A new sequence has joined the queue."""

    def admitted(self, seq: Sequence) -> None:
        """It got its slot and its first blocks; the first `num_computed` tokens were found."""

    def preempted(self, victim: Sequence, winner: Sequence) -> None:
        """`victim` lost slot and blocks to `winner`, which may be itself, and waits again."""

    def waits(self, seq: Sequence, why: Wait) -> None:
        """The first of the queue was not started in this step."""

    def finished(self, seq: Sequence, reason: str) -> None:
        """It has ended: a finish reason."""
