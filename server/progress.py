"""How a start goes, phase by phase."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NoReturn, TextIO

from configs.settings import format_bytes
from engine.protocol import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

_IN_BYTES: Final = ("download", "weights")


class ProgressLines:
    """Shows how the start goes: a bar for each phase on a terminal, else one line for each."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._phase = ""
        self._began = 0.0
        self._finished = False
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, message: Progress) -> None:
        """Takes the next message; phases come one after another. A total of 0 is not known yet."""
        if message.phase != self._phase:
            self._close()
            self._phase, self._began, self._finished = message.phase, time.monotonic(), False
            if self._terminal:
                self._open(message)
        if self._bar is not None:
            self._bar.total = message.total or None
            self._bar.set_postfix_str(message.note, refresh=False)
            self._bar.update(message.done - self._bar.n)
        elif 0 < message.total <= message.done and not self._finished:
            self._finished = True
            self._out.write(self._line(message) + "\n")
            self._out.flush()

    def _open(self, message: Progress) -> None:
        from tqdm import tqdm

        in_bytes = message.phase in _IN_BYTES
        self._bar = tqdm(
            total=message.total or None,
            desc=message.phase,
            file=self._out,
            unit="B" if in_bytes else "",
            unit_scale=in_bytes,
            unit_divisor=1024,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, message: Progress) -> str:
        amount = [format_bytes(message.total)] if message.phase in _IN_BYTES else []
        told = ", ".join([*amount, *([message.note] if message.note else [])])
        return f"{message.phase}: {told} ({time.monotonic() - self._began:.1f} s)"
