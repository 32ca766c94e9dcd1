"""The random checkpoints that are measured, in the format that each peer reads. Made once, kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.home import ROOT


@dataclass(frozen=True)
class Checkpoint:
    """A model, and how much of it is asked for at most.

    Attributes:
        shape: one of `benchmarks.shapes`.
        folder: everything made of it lies below.
        sequences: most at once.
        context: tokens of the longest of them, the answer included.
    """

    shape: str
    folder: Path
    sequences: int
    context: int

    @property
    def hugging_face(self) -> Path:
        """The folder in Hugging Face's format."""
        maker = [sys.executable, "-m", "benchmarks.make_checkpoint", "--shape", self.shape, "{}"]
        return made(self.folder / self.shape, maker)

    def converted(self, ending: str, command: Sequence[str | Path]) -> Path:
        """What `command` makes of it, `{}` standing for the file or folder to write."""
        return made(self.folder / f"{self.shape}{ending}", command)


def made(target: Path, command: Sequence[str | Path]) -> Path:
    """`target`, which appears only when the command has made all of it.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    if not target.exists():
        print(f"making {target.name}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".part-{target.name}")
        if part.is_dir():
            shutil.rmtree(part)
        filled = [str(piece).replace("{}", str(part)) for piece in command]
        subprocess.run(filled, check=True, cwd=ROOT, stdout=sys.stderr)
        part.rename(target)
    return target
