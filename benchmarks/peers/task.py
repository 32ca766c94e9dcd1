"""What every server is asked to do: the workloads of a comparison, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from benchmarks.dialect import Dialect
from benchmarks.load import ClosedLoop
from benchmarks.workload import Chats, Independent, Lengths, Workload


@dataclass(frozen=True)
class Task:
    """A closed loop of `clients`, each asking `requests` scripts one after another.

    Attributes:
        shape: of the model, one of `benchmarks.shapes`.
        input: tokens of a prompt, or of a turn's question.
        output: tokens of an answer, exactly.
        turns: of a chat; single requests have one.
        system: tokens of the system prompt that all chats of a round share; 0 for single requests.
        guess_s: seconds of one round on two cores, for the estimate before a first run.
    """

    name: str
    about: str
    shape: str
    clients: int
    requests: int
    input: int
    output: int
    turns: int = 1
    system: int = 0
    guess_s: float = 5.0

    @property
    def chats(self) -> bool:
        return self.system > 0

    @property
    def loop(self) -> ClosedLoop:
        return ClosedLoop(self.clients, self.requests)

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, the answer included; text never measures exactly."""
        asked = self.system + self.turns * (self.input + self.output)
        return asked + (asked // 4 if self.chats else 16)

    def workload(self, dialect: Dialect) -> Workload:
        asked, answered = Lengths(self.input, self.input), Lengths(self.output, self.output)
        if self.chats:
            return Chats(dialect, asked, answered, self.turns, self.system)
        return Independent(dialect, asked, answered)

    def quick(self) -> Task:
        """The same load, as little of it as shows that it works."""
        return replace(self, requests=1, output=min(self.output, 16), turns=min(self.turns, 2))

    def brief(self) -> Task:
        """To warm up: every client once, answers of eight tokens."""
        return replace(self, requests=1, output=8, turns=1)


SMALL: Final = "llama-56m"
LARGE: Final = "qwen3-0.6b"
TASKS: Final = (
    Task("56m-1", "56M, 1 at once", SMALL, 1, 4, 64, 64, guess_s=3),
    Task("56m-16", "56M, 16", SMALL, 16, 2, 64, 64, guess_s=3),
    Task("56m-64", "56M, 64", SMALL, 64, 2, 64, 64, guess_s=12),
    Task("56m-long", "56M, 16 x 1,024 in", SMALL, 16, 1, 1024, 64, guess_s=8),
    Task("56m-chats", "56M, 16 chats", SMALL, 16, 1, 40, 64, turns=3, system=600, guess_s=10),
    Task("500m-1", "500M, 1 at once", LARGE, 1, 2, 64, 64, guess_s=8),
    Task("500m-8", "500M, 8", LARGE, 8, 1, 64, 64, guess_s=8),
)
