"""What a comparison has measured so far, in a file that the next run goes on from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """Everything in it is plain JSON.

    Attributes:
        file: where it is kept.
        machine: what it was measured on.
        tasks: by name, the fields of `Task`.
        peers: by name: `about`, `version`, `settings` and `starts_s` (both by model).
        rounds: one object each: `task`, `peer`, `round` (from 0) and the figures.
        failures: one object each: `peer`, `task` or model, and why.
    """

    file: Path
    machine: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Record:
        """An empty one where there is no file.

        Raises:
            ValueError: the file holds something else.
        """
        if not file.exists():
            return cls(file)
        try:
            return cls(file, **json.loads(file.read_text(encoding="utf-8")))
        except TypeError as error:
            raise ValueError(f"{file} is no record of a comparison: {error}") from None

    def write(self) -> None:
        """The file is whole at any moment."""
        part = self.file.with_name(f".{self.file.name}.part")
        part.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)

    def content(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "file"}

    def has(self, task: str, peer: str, number: int) -> bool:
        wanted = (task, peer, number)
        return any((one["task"], one["peer"], one["round"]) == wanted for one in self.rounds)

    def values(self, task: str, peer: str, figure: str) -> list[float]:
        """Of all rounds."""
        mine = (one for one in self.rounds if (one["task"], one["peer"]) == (task, peer))
        return [one[figure] for one in mine]

    def settle(self, name: str, value: dict[str, Any]) -> None:
        """Notes what a task is.

        Raises:
            ValueError: the file has rounds of a task of that name that asked something else.
        """
        known = self.tasks.setdefault(name, value)
        if known != value:
            raise ValueError(
                f"{self.file} was made with other settings of {name}: use another --out"
            )
