"""How much of something is done per second, as measured lately."""

from __future__ import annotations

WEIGHT = 0.2  # of the newest measurement


class MovingRate:
    """An exponential moving average. 0 until something was measured."""

    __slots__ = ("per_second",)

    def __init__(self, per_second: float = 0.0) -> None:
        self.per_second = per_second

    def observe(self, amount: float, seconds: float) -> None:
        """Takes one measurement in."""
        if seconds > 0:
            weight = WEIGHT if self.per_second else 1.0
            self.per_second += weight * (amount / seconds - self.per_second)
