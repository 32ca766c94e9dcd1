"""Stop strings in a stream: found wherever they are cut, never partly sent."""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """One stop string as a Knuth-Morris-Pratt automaton: O(1) amortized per character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._fallback = [0] * (len(text) + 1)  # state -> longest proper border of text[:state]
        border = 0
        for i in range(1, len(text)):
            border = self.step(border, text[i])
            self._fallback[i + 1] = border

    def step(self, state: int, char: str) -> int:
        """The longest prefix of the stop string that the text ends with, after one more `char`."""
        while state and (state == len(self.text) or self.text[state] != char):
            state = self._fallback[state]
        return state + (self.text[state] == char)


class StopMatcher:
    """Passes text on up to the first stop string.

    The answer ends at the earliest end of any stop string; of several that end there the longest
    counts. What may still become a stop string is held back.

    Attributes:
        matched: the stop string that ended the answer, or None.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: whether the stop string itself is part of the answer."""
        self._patterns = [_Pattern(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be sent now. Nothing more comes once `matched` is set."""
        if self.matched is not None:
            return ""
        start = len(self._held)
        self._held += text
        for end, char in enumerate(text, start + 1):
            self._states = [
                pattern.step(state, char)
                for pattern, state in zip(self._patterns, self._states, strict=True)
            ]
            if self._ended():
                return self._end_at(end)
        return self._release(len(self._held) - max(self._states, default=0))

    def flush(self) -> str:
        """What was held back, once the answer has ended in another way."""
        return self._release(len(self._held))

    def _ended(self) -> bool:
        whole = [
            pattern.text
            for pattern, state in zip(self._patterns, self._states, strict=True)
            if state == len(pattern.text)
        ]
        self.matched = max(whole, key=len, default=None)
        return self.matched is not None

    def _end_at(self, end: int) -> str:
        assert self.matched is not None
        sent = self._held[: end if self._include else end - len(self.matched)]
        self._held = ""
        return sent

    def _release(self, count: int) -> str:
        sent, self._held = self._held[:count], self._held[count:]
        return sent


def held_back(text: str, mark: str) -> int:
    """Characters at the end of `text` that may be the beginning of `mark`."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)
