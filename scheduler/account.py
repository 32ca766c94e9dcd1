"""What one sequence has cost so far: its times, and the KV blocks that it held."""

from __future__ import annotations


class Account:
    """Kept up to date where something happens to a sequence, never once per step.

    The times of a life, in seconds, follow one another and add up to all of it:

        arrived      started                first_token           ended
           |--- queue ---|------ prefill ------|------ decode ------|

    A sequence that ends earlier than one of them has none of what would follow. Waiting after a
    preemption belongs to the phase in which it happened.

    Attributes:
        preempted: when it was, each time.
        recomputed: tokens that were computed once more because a preemption had thrown them away.
        blocks_peak: most blocks held at once, in all KV groups; shared ones count in full.
        block_seconds: blocks held, times how long. A block behind a sliding window counts until
            the next one is taken.
    """

    __slots__ = (
        "_blocks",
        "_entered",
        "_furthest",
        "_since",
        "arrived",
        "block_seconds",
        "blocks_peak",
        "ended",
        "first_token",
        "preempted",
        "recomputed",
        "started",
    )

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self.preempted: list[float] = []
        self.recomputed = self.blocks_peak = 0
        self.block_seconds = 0.0
        self._blocks = 0
        self._since = arrived
        self._entered = self._furthest = 0  # computed tokens when it entered, and ever

    def enter(self, computed: int, blocks: int, now: float) -> None:
        """It begins to run, or begins again, with `computed` tokens found and `blocks` held."""
        if self.started is None:
            self.started = now
        self._entered = computed
        self.hold(blocks, now)

    def hold(self, blocks: int, now: float) -> None:
        """From now on it holds `blocks`."""
        self.block_seconds += self._blocks * (now - self._since)
        self._blocks, self._since = blocks, now
        self.blocks_peak = max(self.blocks_peak, blocks)

    def leave(self, computed: int, now: float) -> None:
        """It gives all of its blocks back; `computed` tokens had keys and values."""
        self.recomputed += max(min(computed, self._furthest) - self._entered, 0)
        self._furthest = max(self._furthest, computed)
        self.hold(0, now)

    @property
    def queue(self) -> float:
        return self._until(self.started) - self.arrived

    @property
    def prefill(self) -> float:
        return 0.0 if self.started is None else self._until(self.first_token) - self.started

    @property
    def decode(self) -> float:
        return 0.0 if self.first_token is None else self._until(self.ended) - self.first_token

    def _until(self, moment: float | None) -> float:
        """`moment`, or the end where it never came."""
        if moment is not None:
            return moment
        assert self.ended is not None, "the sequence has not ended"
        return self.ended
