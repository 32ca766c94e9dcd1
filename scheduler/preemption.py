"""What becomes of the blocks of a sequence that gives way."""

from __future__ import annotations

from typing import Literal

from paged_cache.rate import MovingRate

PreemptionMode = Literal["recompute", "swap", "auto"]


class Preemption:
    """Chooses between computing a preempted sequence again and moving its blocks to host memory and
    back.

    Args:
        mode: `auto` takes what is estimated to be cheaper.
        bytes_per_block: what moving one block moves.
        copying: bytes per second between the pool and host memory.

    Attributes:
        computing: tokens per second of steps that read prompts.
        num_swapped, num_recomputed: preemptions of each kind, since start.
    """

    def __init__(
        self,
        mode: PreemptionMode = "recompute",
        bytes_per_block: int = 0,
        copying: MovingRate | None = None,
    ) -> None:
        self.mode = mode
        self.bytes_per_block = bytes_per_block
        self.copying = copying or MovingRate()
        self.computing = MovingRate()
        self.num_swapped = self.num_recomputed = 0

    @property
    def total(self) -> int:
        """Preemptions of both kinds, since start."""
        return self.num_swapped + self.num_recomputed

    def prefers_swap(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether `num_blocks` blocks should be moved out and back rather than their `num_tokens`
        tokens computed again. What was never measured counts as slow."""
        if self.mode != "auto":
            return self.mode == "swap"
        if not self.copying.per_second:
            return False
        if not self.computing.per_second:
            return True
        moving = 2 * num_blocks * self.bytes_per_block / self.copying.per_second
        return moving < num_tokens / self.computing.per_second

    def count(self, swapped: bool) -> None:
        """Counts a preemption."""
        self.num_swapped += swapped
        self.num_recomputed += not swapped
