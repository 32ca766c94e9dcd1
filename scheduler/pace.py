"""How much of prompts a step reads while others wait for their next token."""

from __future__ import annotations

from paged_cache.rate import MovingRate
from scheduler.plan import StepPlan

LEAST = 16
"""Tokens of prompts that a step reads at any rate."""


class Pace:
    """Keeps steps short for those who decode, by what steps took lately.

    A step that only decodes takes d seconds. Prompts may make it longer by (stretch - 1) * d, or,
    where more sequences wait for their first token than for their next, by d for each of them per
    decoding one: everybody then has an equal share of the time.

    Args:
        stretch: 0 lets prompts take whole steps, as many tokens as a step may have.
    """

    def __init__(self, stretch: float = 0.0) -> None:
        self.stretch = stretch
        self._reading = MovingRate()  # tokens
        self._decoding: dict[int, MovingRate] = {}  # steps, by the bits of how many decode

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Takes in how long a step took, where that is going to be asked for."""
        if not self.stretch or seconds <= 0:
            return
        decoding = sum(item.count == 1 for item in plan.scheduled)
        read = plan.num_tokens - decoding
        if not read:
            self._decoding.setdefault(decoding.bit_length(), MovingRate()).observe(1, seconds)
        else:
            self._reading.observe(read, seconds - self._decode_seconds(decoding))

    def room(self, decoding: int, reading: int) -> int:
        """Tokens of prompts for a step in which so many sequences decode and so many wait for
        their first token."""
        share = max(self.stretch - 1, reading / decoding)
        seconds = self._decode_seconds(decoding) * share
        return max(LEAST, int(seconds * self._reading.per_second))

    def _decode_seconds(self, decoding: int) -> float:
        """Of a step with so many decodes or, where none was seen, the most similar number."""
        if not self._decoding or not decoding:
            return 0.0
        bits = decoding.bit_length()
        return 1 / self._decoding[min(self._decoding, key=lambda b: abs(b - bits))].per_second
