"""What a model thinks before it answers, told apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from server.stops import held_back


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """What stands around the thoughts."""

    start: str
    end: str


MARKS: Final = {
    "think": ReasoningMarks("<think>", "</think>"),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
}


def marks_of(template: str) -> str | None:
    """The name of the marks that a chat template knows, or None."""
    return next((name for name, marks in MARKS.items() if marks.end in template), None)


class ReasoningReader:
    """Splits one answer, which begins with thoughts or has none.

    Args:
        open: the prompt ends with the start mark, so the answer begins within the thoughts.

    Attributes:
        thinking: whether the next character would be a thought.
    """

    def __init__(self, marks: ReasoningMarks, *, open: bool) -> None:
        self._marks = marks
        self._pending = ""
        self._decided = self.thinking = open  # whether it is known that there are thoughts
        self._ended = False

    def push(self, text: str) -> tuple[str, str]:
        """Takes more of the answer in: (thoughts, answer)."""
        if self._ended:
            return "", text
        self._pending += text
        if not self._decided and not self._decide():
            return "", self._give() if self._ended else ""
        thoughts, found, rest = self._pending.partition(self._marks.end)
        if found:
            self._ended, self.thinking, self._pending = True, False, ""
            return thoughts, rest
        keep = held_back(self._pending, self._marks.end)
        certain = len(self._pending) - keep
        thoughts, self._pending = self._pending[:certain], self._pending[certain:]
        return thoughts, ""

    def _decide(self) -> bool:
        """Whether the answer begins with the start mark, as far as that is known."""
        begun = self._pending.lstrip()
        start = self._marks.start
        if begun.startswith(start):
            self._decided = self.thinking = True
            self._pending = begun[len(start) :]
        elif not start.startswith(begun):
            self._ended = True
        return self._decided

    def _give(self) -> str:
        text, self._pending = self._pending, ""
        return text

    def finish(self) -> tuple[str, str]:
        """What is left once the answer has ended."""
        text = self._give()
        return (text, "") if self._decided else ("", text)
