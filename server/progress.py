"""How a start goes, phase by phase."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, Self

from configs.settings import format_bytes
from engine.protocol import Progress

if TYPE_CHECKING:
    from tqdm import tqdm

_IN_BYTES: Final = ("download", "weights")
logger = logging.getLogger("quire.start")


class ProgressDisplay(Protocol):
    """Shows messages; phases come one after another, and a total of 0 is not known yet."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, message: Progress) -> None:
        """Takes the next message."""


class ProgressLines:
    """A log line for each phase, when it is over."""

    def __init__(self) -> None:
        self._phase, self._began, self._finished = "", 0.0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, message: Progress) -> None:
        if message.phase != self._phase:
            self._phase, self._began, self._finished = message.phase, time.monotonic(), False
        if 0 < message.total <= message.done and not self._finished:
            self._finished = True
            amount = [format_bytes(message.total)] if message.phase in _IN_BYTES else []
            told = ", ".join([*amount, *([message.note] if message.note else [])])
            seconds = time.monotonic() - self._began
            logger.info("%s: %s (%.1f s)", message.phase, told, seconds)


class ProgressBars:
    """A bar for each phase on a terminal."""

    def __init__(self) -> None:
        self._phase = ""
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, message: Progress) -> None:
        if self._bar is None or message.phase != self._phase:
            self.__exit__()
            self._phase, self._bar = message.phase, _bar(message)
        self._bar.total = message.total or None
        self._bar.set_postfix_str(message.note, refresh=False)
        self._bar.update(message.done - self._bar.n)


def _bar(message: Progress) -> tqdm[NoReturn]:
    from tqdm import tqdm

    in_bytes = message.phase in _IN_BYTES
    return tqdm(
        total=message.total or None,
        desc=message.phase,
        file=sys.stderr,
        unit="B" if in_bytes else "",
        unit_scale=in_bytes,
        unit_divisor=1024,
    )


def display(*, text: bool) -> ProgressDisplay:
    """Bars for somebody who watches a terminal; `text`: whether logs are text."""
    return ProgressBars() if text and sys.stderr.isatty() else ProgressLines()
